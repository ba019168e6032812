"""`tempo-engine bench throughput`: that stacks do the same work, and that it would be noticed if one did not. No TRL needed."""

import io
import json
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tempo_em.cli import app
from tempo_em.throughput import authors, cases, engine, floor, measure, plain, worker
from tempo_em.throughput.process import Failed, Process
from tempo_em.throughput.report import table
from tempo_em.throughput.stacks import STACKS, Stack
from tempo_em.throughput.turns import Facts, Turns
from tempo_em.throughput.work import Case, label, reward
from tempo_engine.errors import UserError
from typer.testing import CliRunner

LENGTHS = [5, 3, 9, 2, 4, 7, 1, 6]


def case_of(**fields: Any) -> Case:
    defaults: dict[str, Any] = {"model": cases.qwen3(64, 2, 97), "num_prompts": 2, "group_size": 4, "prompt_tokens": 6}
    return Case("small", **{**defaults, "lengths": LENGTHS, **fields})


def steps(stack: Any, case: Case, count: int, **more: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    told: list[dict[str, Any]] = []
    moments = stack.run(case, Turns(["go"] * count, told.append), **more)
    return told, moments


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "throughput", *arguments])
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


# --- Equal work --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_tokens", [6, 80])  # those of 80 tokens are computed once for their group
def test_the_engine_has_the_gradients_of_a_plain_padded_step(prompt_tokens: int) -> None:
    case = case_of(prompt_tokens=prompt_tokens, parts=2)
    (ours,), our_moments = steps(engine, case, 1, given=True)
    (theirs,), their_moments = steps(floor, case, 1, given=True)
    assert measure.largest_difference(our_moments, their_moments) < measure.LIMITS["float32"]
    assert [ours[name] for name in measure.WORK] == [theirs[name] for name in measure.WORK]
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert ours["trained"] == sum(LENGTHS)


def test_the_engine_samples_the_planned_lengths_with_sglang_too() -> None:
    case = case_of(sampler="sglang")
    told, _ = steps(engine, case, 2)
    (plain_step,), _ = steps(floor, case, 1)
    assert [[step[name] for name in measure.WORK] for step in told] == [[plain_step[name] for name in measure.WORK]] * 2


def test_the_engine_has_the_gradients_of_the_authors_update_in_both_models() -> None:
    case = case_of(method="tempo", parts=2)
    (ours,), our_moments = steps(engine, case, 1, given=True)
    (theirs,), their_moments = steps(authors, case, 1, given=True)
    assert measure.largest_difference(our_moments, their_moments) < measure.LIMITS["float32"]
    assert {name.split(".")[0] for name in our_moments} == {"policy", "critic"}
    assert ours["updates"] == theirs["updates"] == 2
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_in_bfloat16_all_gradients_together_are_compared() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}  # a norm of 13
    found = {"a": torch.tensor([3.0, 2.7]), "b": torch.tensor([12.0])}
    assert measure.largest_difference(found, truth) == pytest.approx(0.26)
    assert measure.whole_difference(found, truth) == pytest.approx(0.1)
    assert measure.whole_difference({"a": truth["a"]}, truth) == float("inf")


@pytest.mark.parametrize("method", ["grpo", "tempo"])
def test_sampled_steps_do_the_planned_work_on_all_sides(method: Any) -> None:
    case = case_of(method=method)
    sides = {"engine": engine, "peer": floor if method == "grpo" else authors}
    found = {name: steps(stack, case, 2)[0] for name, stack in sides.items()}
    assert measure.unequal(case, found["engine"], found["peer"]) == ""
    assert [len(took) for took in found.values()] == [2, 2]


def test_other_rows_other_tokens_or_more_updates_are_unequal_work() -> None:
    case = case_of()
    facts = Facts([([1, 2], 5), ([3, 4], 6)], 37, 37, 1, 0.0, 1.0)
    assert facts.work() == replace(facts, rows=list(reversed(facts.rows))).work()  # TRL shuffles rows
    same = [facts.work()]
    assert measure.unequal(case, same, same) == ""
    for change in ({"rows": [([1, 2], 6), ([3, 4], 5)]}, {"trained": 36}, {"generated": 38}, {"updates": 2}):
        other = [replace(facts, **change).work()]
        assert measure.unequal(case, same, other).startswith(f"unequal work: {next(iter(change))}")
    short = [replace(facts, generated=30).work()]
    assert measure.unequal(case, short, short) == "unequal work: 30 tokens sampled, 37 planned"


def test_generate_ends_each_row_at_its_planned_length_and_not_before() -> None:
    case = case_of()
    processor = plain.Planned(case)
    for generated, ending in [(0, [6]), (1, [3]), (8, [2])]:
        scores = processor(torch.zeros(8, 6 + generated, dtype=torch.int64), torch.zeros(8, 97))
        assert (scores[:, case.eos_id] == 0).nonzero()[:, 0].tolist() == ending
        assert (scores[ending, : case.eos_id] == -torch.inf).all()


def test_rewards_are_functions_of_the_ids_alone() -> None:
    assert reward([2, 4, 5, 7]) == 0.5
    assert (label([2, 4, 5]), label([2, 5])) == (1.0, -1.0)


def test_a_case_travels_as_json_and_has_the_same_prompts_and_responses_everywhere() -> None:
    case = case_of()
    assert case.given == case_of().given
    assert list(map(len, case.given)) == LENGTHS
    assert all(ids[-1] == case.eos_id for ids in case.given)
    tokenizer = case.tokenizer()
    assert tokenizer(text=[str(tokenizer.decode(ids)) for ids in case.prompts])["input_ids"] == case.prompts


def test_a_case_of_another_number_of_lengths_than_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="8 rows have 8 planned lengths, got 2"):
        case_of(lengths=[1, 2])


def test_the_authors_value_clip_takes_back_the_mean_change_of_a_row() -> None:
    rows = plain.Rows(torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([[1, 1]]))
    value_BT = torch.tensor([[0.5, 0.7]])  # moved by 0.6 on average, of which 0.1 may stay
    loss_B = authors.value_loss(value_BT, torch.zeros(1, 2), torch.ones(1, 1), rows)
    assert loss_B.item() == pytest.approx(0.5 * (1.0**2 + 0.8**2) / 2)


# --- Rows --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A benchmark without processes: what each stack's would say, by name."""
    moment = {"w": torch.ones(3)}
    step = Facts([([1], 37)], 37, 37, 1, 0.0, 1.0).work() | {
        "wall": 2.0,
        "cpu": 1.0,
        "generating": 0.25,
        "peak_bytes": 100,
    }
    stacks = {name: {"moments": moment, "step": dict(step)} for name in ("engine", "trl", "floor")}

    def said(kind: str, stack: str, case: Case, path: Path, pythons: Any) -> Any:
        if isinstance(stacks[stack]["moments"], str):
            raise Failed(f"failed: {stacks[stack]['moments']}")
        return stacks[stack]["step"], stacks[stack]["moments"]

    def in_turn(case: Case, problems: dict[str, str], rounds: int, pythons: Any, progress: Any) -> Any:
        return {stack: [stacks[stack]["step"]] * rounds for stack, problem in problems.items() if not problem}

    monkeypatch.setattr(measure, "said", said)
    monkeypatch.setattr(measure, "in_turn", in_turn)
    small = measure.CASES["tiny"]._replace(build=lambda quick: case_of(), peers=("trl", "floor"))
    monkeypatch.setitem(measure.CASES, "tiny", small)
    monkeypatch.setitem(STACKS, "trl", Stack("trl"))
    return stacks


def test_a_row_has_the_ratio_of_speeds_and_both_peaks(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["trl"]["step"] |= {"cpu": 2.0, "peak_bytes": 400}
    code, output = bench("--case", "tiny", "--json", str(tmp_path / "rows.json"))
    assert code == 0
    assert "37 (37 to 37)" in output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert set(written) == {"device", "commit", "rows"}
    row = written["rows"][0]
    assert list(row)[:10] == [
        "op", "case", "dtype", "ours", "peer", "theirs", "ratio", "unit", "peak_bytes", "checked",
    ]  # fmt: skip
    assert (row["peer"], row["ours"], row["theirs"], row["ratio"]) == ("trl", 37.0, 18.5, 2.0)
    assert (row["peak_bytes"], row["peer_peak_bytes"], row["memory_ratio"], row["target"]) == (100, 400, 0.25, 1.0)
    assert (row["wall"], row["generating"], row["repeats"]) == ([2.0, 2.0], [0.25, 0.125], 5)


@pytest.mark.parametrize("wrong", [torch.full((3,), 1.1), torch.tensor([1.0, 1.0, torch.nan])])
def test_wrong_gradients_are_not_timed_and_ours_fail_the_command(tried: dict[str, Any], wrong: torch.Tensor) -> None:
    tried["trl"]["moments"] = {"w": wrong}
    code, output = bench("--case", "tiny")
    assert code == 0  # a peer's mistake is the peer's
    assert "trl: wrong: its gradients are off by" in output
    tried["engine"]["moments"] = {"w": wrong}
    code, output = bench("--case", "tiny")
    assert code == 1
    assert "engine: wrong: its gradients are off by" in output
    assert "37 (37" not in output


def test_unequal_work_is_refused_and_fails_the_command(tried: dict[str, Any]) -> None:
    tried["trl"]["step"]["generated"] = 38
    code, output = bench("--case", "tiny")
    assert code == 1
    assert "unequal work: generated 37 against 38" in output


def test_a_reference_that_breaks_leaves_nothing_to_check_with(tried: dict[str, Any]) -> None:
    tried["floor"]["moments"] = "out of memory"
    code, output = bench("--case", "tiny")
    assert code == 1
    assert "engine: nothing to check it with: floor failed: out of memory" in output


def test_a_stack_that_is_not_here_says_so_in_one_sentence(
    tried: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STACKS, "trl", Stack("trl", ("no_such_package",), "pip install it"))
    code, output = bench("--case", "tiny")
    assert code == 0
    assert "trl: not installed: no_such_package; pip install it" in output


def test_a_stack_with_its_own_python_is_asked_there_what_it_lacks(tmp_path: Path) -> None:
    here = measure.missing("floor", case_of(), {"floor": sys.executable})
    assert here == ""
    empty = tmp_path / "python"  # an environment without tempo-engine
    empty.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'tempo_em'\" >&2\nexit 1\n")
    empty.chmod(0o755)
    there = measure.missing("floor", case_of(), {"floor": str(empty)})
    assert there.startswith("failed: ModuleNotFoundError: No module named 'tempo_em'")
    assert f"{empty} needs tempo-engine as well" in there


def test_a_stack_for_gpus_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Stack("x", needs_gpu=True).missing() == "needs a GPU, of which there is none here"


def test_the_table_colours_targets_that_are_met_and_missed() -> None:
    blank = measure.Row(
        "rl_step", "tiny", "float32", 100.0, "trl", 80.0, 1.25, "tokens per CPU-second", 10 * 2**20, True
    )
    met = replace(blank, quartiles=[[90, 110], [70, 90]], target=1.0, peer_peak_bytes=20 * 2**20, wall=[1.0, 1.25])
    missed = replace(met, case="mixed", target=1.5, memory_ratio=0.5, memory_target=1 / 3)
    console = Console(width=220, file=io.StringIO(), force_terminal=True)
    console.print(table([met, missed]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\x1b[32m1.25" in text
    assert "\x1b[31m1.25" in text
    assert "ours 0.50 of it" in text


# --- The command -------------------------------------------------------------------------------------------------------------


def test_a_process_does_a_step_when_told_to_and_one_that_dies_is_noticed() -> None:
    with Process("steps", "floor", case_of()) as one:
        assert one.ask() == {"ready": "small"}
        took = one.ask("go")
        assert (took["generated"], took["updates"]) == (sum(LENGTHS), 1)
        one.process.kill()
        with pytest.raises(Failed):
            one.ask("go")


def test_a_process_may_close_what_it_started_unless_we_leave_in_a_hurry() -> None:
    with Process("steps", "floor", case_of()) as one:
        one.ask()
        one.ask("go")
    assert one.process.returncode == 0
    hurried = Process("steps", "floor", case_of())
    hurried.__exit__(KeyboardInterrupt, None, None)
    assert hurried.process.returncode == -signal.SIGKILL


def test_a_worker_measures_memory_and_leaves_its_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "say_nothing_else", lambda: told.append)
    worker.main("look", "floor", json.dumps(asdict(case_of())), str(tmp_path / "moments"))
    assert told[0]["peak_bytes"] > 0
    assert "lm_head.weight" not in load_file(tmp_path / "moments")  # tied
    assert "model.embed_tokens.weight" in load_file(tmp_path / "moments")


def test_a_stack_that_works_in_another_process_says_itself_what_that_one_held() -> None:
    def elsewhere(case: Case, turns: Turns) -> None:
        while turns.go():
            turns.done(lambda: Facts([], 0, 0, 1, 0.0, 1.0, peak_bytes=7))

    told: list[dict[str, Any]] = []
    worker.memory(elsewhere, case_of(), told.append)  # pyright: ignore[reportArgumentType]
    assert told[0]["peak_bytes"] == 7


def test_a_worker_that_breaks_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "say_nothing_else", lambda: told.append)
    with pytest.raises(UserError):
        worker.main("steps", "engine", json.dumps(asdict(case_of(model="no/such/model"))))
    assert told[1]["error"].startswith("UserError: no/such/model is not a Hugging Face model directory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "huge"], "no case is called 'huge'; cases: tiny, mixed, vocabulary, prompts, smollm2, tempo"),
        (["--json", "nowhere/rows.json"], "the folder nowhere does not exist"),
        (
            ["--python", "rllib=python3"],
            "no stack is called 'rllib'; stacks: engine, trl, trl_vllm, verl, floor, authors",
        ),
        (["--python", "verl=no/python"], "'no/python' is not a program; it takes STACK=PATH of a python"),
        (["--sampler", "vllm"], "it is local or sglang"),
        (["--sampler", "sglang"], "on a CPU its servers' time is not in the CPU-seconds of a step"),
        (["--python", "verl"], "'' is not a program; it takes STACK=PATH of a python"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    code, output = bench(*arguments)
    assert code == 2
    assert message in output


def test_without_the_real_model_its_case_says_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = bench("--case", "smollm2")
    assert code == 2
    assert "run make smollm2" in output
