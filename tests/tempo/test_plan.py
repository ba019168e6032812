"""`tempo-engine plan` as a user meets it: pages, exit codes, advice that holds; and recipes checked before any download."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tempo_em.cli import app
from tempo_em.commands import plan_command, train_command
from tempo_em.loading import load_recipe, packaged
from tempo_em.plan import make_plan
from tempo_em.plan.configs import packaged_models
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
REAL = ["olmo3-7b-aime", "qwen3-8b-aime", "qwen3-14b-aime", "qwen3-8b-general", "mistral-large-aime"]


def plan(recipe: str, *settings: str, gpu: str | None = None, gpus: int | None = None, nodes: int = 1, to: Path) -> Any:
    """Exit code and the JSON that was written."""
    file = to / "plan.json"
    code = plan_command(recipe, list(settings), gpu, gpus, nodes, file)
    return code, json.loads(file.read_text())


@pytest.mark.parametrize("name", REAL)
def test_the_recipes_of_real_models_fit_on_the_machines_they_name(name: str, tmp_path: Path) -> None:
    assert "8 x 80 GB" in packaged("recipes")[name].splitlines()[0]
    code, found = plan(name, nodes=64 if name == "mistral-large-aime" else 1, to=tmp_path)
    assert code == 0
    assert found["machine"] == "h100"
    assert found["memory"]["free"] > 0.05 * found["memory"]["usable"]
    assert found["tokens"]["generated"] == load_recipe(name, []).recipe.em.rollouts * 16384


@pytest.mark.parametrize("name", ["olmo3-7b-aime", "qwen3-8b-aime", "qwen3-8b-general"])
def test_the_engines_own_sampler_fits_as_well(name: str) -> None:
    """A whole group at a time, for those who have no servers."""
    recipe = load_recipe(name, ["rollout.backend=local"]).recipe
    assert make_plan(recipe, gpu="h100", per_node=8).most_running >= recipe.em.group_size


@pytest.mark.parametrize("name", packaged("recipes"))
def test_every_packaged_recipe_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command(name, [], None, None, 64 if name == "mistral-large-aime" else 1, None) == 0
    page = capsys.readouterr().out
    assert "Peak memory of one process at the longest sample" in page
    assert "bottleneck: " in page
    assert "It does not fit" not in page


def test_the_page_says_what_fills_memory_and_what_bounds_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command("qwen3-8b-aime", [], None, None, 1, None) == 0
    page = capsys.readouterr().out
    assert "qwen3-8b-aime: 1 x 8 h100, bfloat16, FSDP2 over 8 shards" in page
    assert "policy 8.19 B (36 blocks of 192.95 M, embedding 622.33 M, LM head 622.33 M); critic 7.57 B" in page
    assert "SGLang on the same GPUs, 8 servers of one GPU" in page
    assert "bottleneck: rollout" in page
    assert "assumed, not measured: 50% of peak operations" in page


def test_what_does_not_fit_gets_advice_that_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = plan("qwen3-14b-aime", "parallel.accumulate=whole", to=tmp_path)
    assert code == 1
    assert "too large by" in capsys.readouterr().out
    advice = {row["change"]: row for row in found["advice"]}
    assert advice["--set parallel.accumulate=sharded"]["fits"]
    assert not advice["--set parallel.offload=true"]["fits"]
    for change, row in advice.items():
        words = change.split()
        settings = [
            "parallel.accumulate=whole",
            *(w for before, w in itertools.pairwise(words) if before == "--set"),
        ]
        nodes = int(words[words.index("--nodes") + 1]) if "--nodes" in words else 1
        again, replanned = plan("qwen3-14b-aime", *settings, nodes=nodes, to=tmp_path)
        assert again == (0 if row["fits"] else 1)
        assert replanned["memory"]["peak"] == row["peak"]


def test_when_no_single_change_is_enough_changes_are_joined(tmp_path: Path) -> None:
    settings = ("parallel.accumulate=whole", "model.activation_checkpointing='off'")
    code, found = plan("qwen3-14b-aime", *settings, to=tmp_path)
    assert code == 1
    *_, last = found["advice"]
    assert last["fits"]
    assert last["change"] == "--set model.activation_checkpointing=full --set parallel.accumulate=sharded"


def test_as_many_processes_as_it_takes_are_proposed(tmp_path: Path) -> None:
    code, found = plan("mistral-large-aime", gpu="h200", gpus=1, to=tmp_path)
    assert code == 1
    more = next(row["change"].split() for row in found["advice"] if row["change"].startswith("--gpus"))
    gpus, nodes = int(more[1]), int(more[3])
    assert plan("mistral-large-aime", gpu="h200", gpus=gpus, nodes=nodes, to=tmp_path)[0] == 0
    assert plan("mistral-large-aime", gpu="h200", gpus=gpus, nodes=nodes // 2, to=tmp_path)[0] == 1


def test_when_one_sample_is_too_long_for_any_number_of_gpus_a_shorter_one_is_proposed(tmp_path: Path) -> None:
    code, found = plan("mistral-large-aime", "rollout.max_new_tokens=32768", nodes=64, to=tmp_path)
    assert code == 1
    assert [row["change"] for row in found["advice"] if row["fits"]] == ["--set rollout.max_new_tokens=16384"]


def test_numbers_in_the_file_add_up(tmp_path: Path) -> None:
    _, found = plan("qwen3-8b-aime", "mstep.kl_coef=0.01", to=tmp_path)
    memory = found["memory"]
    for phase in memory["phases"].values():
        assert phase["total"] == pytest.approx(sum(phase["items"].values()))
    assert memory["peak"] == max(phase["total"] for phase in memory["phases"].values())
    assert memory["free"] == pytest.approx(memory["usable"] - memory["peak"])
    assert {"rollout", "values", "critic update", "log-probs", "reference log-probs", "policy update"} == set(
        memory["phases"]
    )
    assert found["parameters"]["total"] == 8_190_735_360
    assert found["time"]["seconds"] == pytest.approx(
        sum(max(phase["seconds"].values()) for phase in found["time"]["phases"].values())
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": ["rollout.max_new_tokens=60000"]}, "is 62048, but the model takes 32768 positions"),
        ({"settings": ["parallel.replicas=3"]}, "parallel.replicas is 3, which does not divide 8 processes"),
        ({"settings": ["model.path=models/Qwen9-8B"]}, "does not exist, and no config is packaged for Qwen9-8B"),
        ({"gpu": "abacus"}, "--gpu abacus is not known; plan knows a100, h100, h200, b200, mi300x, cpu"),
        ({"gpu": "cpu"}, "flash_attention_2 needs a GPU"),
        ({"json_file": Path("nowhere/plan.json")}, "the folder nowhere does not exist"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    arguments: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"settings": [], "gpu": None, "gpus": None, "nodes": 1, "json_file": None, **arguments}
    assert plan_command("qwen3-8b-aime", *given.values()) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_directory_is_planned_by_its_own_config(tmp_path: Path) -> None:
    config = {**packaged_models()["Qwen3-8B"], "num_hidden_layers": 2}
    (tmp_path / "Qwen3-8B").mkdir()
    (tmp_path / "Qwen3-8B" / "config.json").write_text(json.dumps(config))
    _, found = plan("qwen3-8b-aime", f"model.path={tmp_path}/Qwen3-8B", to=tmp_path)
    assert found["parameters"]["total"] == 8_190_735_360 - 34 * 192_946_432


def test_a_plan_imports_no_torch() -> None:
    code = (
        "import sys; from tempo_em.plan.command import plan_recipe; plan_recipe('qwen3-8b-aime', [], None, None, 1, None); "
        "print([m for m in ('torch', 'transformers', 'tempo_kernels') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize("name", REAL)
def test_a_dry_run_says_what_is_missing_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_command(name, [], None, None, None, True) == 0
    page = capsys.readouterr().out
    recipe = load_recipe(name, []).recipe
    assert "dtype: bfloat16  # file" in page
    assert f"# before training: put the weights of {recipe.model.path.name} " in page  # pyright: ignore[reportOptionalMemberAccess]
    assert page.count("# before training: put the questions of data.") == 2 + len(recipe.data.evaluation)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_names_only_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "aime26.jsonl").write_text('{"prompt": "1 + 1", "answer": 2}')
    assert train_command("qwen3-8b-aime", [], None, None, None, True) == 0
    page = capsys.readouterr().out
    assert "aime26.jsonl" not in page.split("# before training", 1)[1]
    assert f"put the questions of data.unlabelled at {tmp_path}/data/aime-beyond.jsonl" in page


def test_a_dry_run_refuses_samples_beyond_the_model_s_positions(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command("qwen3-8b-aime", ["rollout.max_new_tokens=60000"], None, None, None, True) == 2
    assert "takes 32768 positions" in capsys.readouterr().err


DOCUMENTED = re.findall(
    r"```console\n\$ tempo-engine plan (.+?)\n(.*?)```", (ROOT / "tempo/docs/plans.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize(("arguments", "shown"), DOCUMENTED, ids=[arguments for arguments, _ in DOCUMENTED])
def test_the_documented_plans_are_what_the_command_prints(arguments: str, shown: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments.split()])
    printed = "\n".join(line.rstrip() for line in result.output.splitlines())
    for part in shown.split("...\n"):
        assert part.strip("\n") in printed
