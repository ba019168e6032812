"""The command line as a user meets it: real processes, exit codes, one sentence for a mistake and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tempo_em.commands import data_command, report_command, train_command
from tempo_em.loading import packaged
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, LlamaConfig

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHORT = ("--set", "cold_start.steps=20", "--set", "em.iterations=2", "--set", "evaluation.samples=2")


def tempo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tempo_em", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def tiny(**changes: object) -> dict[str, object]:
    return {**yaml.safe_load(packaged("recipes")["tiny"]), **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of the tiny recipe and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = tempo("train", "tiny", *SHORT, "--run-dir", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return folder / "run", result.stdout


def test_a_run_folder_explains_itself(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {
        "recipe.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "summary.json", "curves.png", "checkpoints",
        "start", "policy", "critic",
    }  # fmt: skip
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "iterations: 2  # --set" in (run_dir / "recipe.yaml").read_text()


def test_the_summary_has_stages_sets_and_metrics(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert list(summary["stages"]) == ["base", "start", "final"]
    for stage in summary["stages"].values():
        assert set(stage) == {"unlabelled", "labelled_heldout"}
        assert {"mean@2", "pass@2", "maj@2"} <= set(stage["unlabelled"])
    assert {"critic/auroc", "critic/brier", "critic/ece"} <= set(summary["stages"]["final"]["labelled_heldout"])
    assert summary["tokens"]["generated"] > 0 < summary["tokens"]["trained"]
    assert {"rollout", "e_step", "m_step", "evaluation"} <= set(summary["seconds"])


def test_metrics_have_one_line_an_iteration_and_verls_names(finished: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row.get("stage") == "em"] == [1, 2]
    em = next(row for row in rows if row.get("stage") == "em")
    assert {
        "actor/pg_loss",
        "actor/ppo_kl",
        "actor/entropy",
        "actor/grad_norm",
        "critic/vf_loss",
        "critic/score/mean",
    } <= set(em)
    assert {"response_length/mean", "perf/throughput", "timing_s/step", "timing_s/rollout", "rollout/version"} <= set(
        em
    )
    final = next(row for row in rows if row.get("evaluation") == "final")
    assert {"val-core/unlabelled/acc/mean@2", "val-aux/labelled_heldout/critic/auroc"} <= set(final)


def test_evaluations_keep_a_few_responses_and_what_the_critic_thought_of_them(finished: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    final = [row for row in rows if (row["evaluation"], row["set"]) == ("final", "unlabelled")]
    assert [len(row["values"]) - len(row["tokens"]) for row in final if "tokens" in row] == [1] * 4
    assert all(row["values"][-1] == row["terminal"] for row in final if "tokens" in row)
    assert {type(row["right"]) for row in rows} == {bool}
    assert not any("terminal" in row for row in rows if row["evaluation"] == "base")
    metrics = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    bins = next(row for row in metrics if row.get("evaluation") == "final")["reliability"]["unlabelled"]
    assert sum(count for count, _, _ in bins) == 16 * 2


def test_a_report_is_written_into_the_run_folder(finished: tuple[Path, str]) -> None:
    assert report_command([finished[0]], None, False) == 0
    page = (finished[0] / "report.html").read_text()
    assert "EM iterations of tempo" in page
    assert "Reliability, unlabelled" in page


def test_plain_lines_and_a_table_when_piped(finished: tuple[Path, str]) -> None:
    stdout = finished[1]
    assert "\x1b[" not in stdout
    assert "EM 2/2" in stdout
    assert all(word in stdout for word in ("base", "start", "final", "mean@2"))


def test_exports_load_in_transformers(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    policy = AutoModelForCausalLM.from_pretrained(run_dir / "policy")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "policy")
    assert policy(**tokenizer("1 2 3 = (4)", return_tensors="pt")).logits.shape[1] == 5
    assert AutoModelForTokenClassification.from_pretrained(run_dir / "critic").config.num_labels == 1


def test_eval_of_a_run_and_of_a_model_directory(finished: tuple[Path, str], tmp_path: Path) -> None:
    run_dir, _ = finished
    result = tempo("eval", str(run_dir), "--json", "out.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert {"mean@2", "critic/auroc"} <= set(metrics["unlabelled"])
    model = tempo("eval", str(run_dir / "policy"), "--recipe", "tiny", "--set", "evaluation.samples=2", cwd=tmp_path)
    assert model.returncode == 0, model.stderr
    assert "labelled_heldout" in model.stdout


def test_a_new_run_begins_with_the_exported_policy_and_critic(finished: tuple[Path, str], tmp_path: Path) -> None:
    path = f"model.path={finished[0] / 'policy'}"
    critic = f"critic.path={finished[0] / 'critic'}"
    short = (
        "--set",
        "em.iterations=1",
        "--set",
        "evaluation.samples=2",
        "--set",
        "initialisation={critic_warmup: 0, rlvr: 0}",
    )
    settings = ("--set", path, "--set", critic, "--set", "model.create=null", "--set", "cold_start.steps=0")
    result = tempo("train", "tiny", *short, *settings, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "critic/auroc" in summary["stages"]["start"]["unlabelled"], "the loaded critic is a fitted one"


def test_a_run_folder_in_use_is_not_overwritten(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    result = tempo("train", "tiny", *SHORT, "--run-dir", str(run_dir), cwd=run_dir.parent)
    assert result.returncode == 2
    assert "add --resume" in result.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_recipe_is_refused_by_name(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    result = tempo("train", "tiny", *SHORT, "--set", "seed=5", "--resume", str(run_dir), cwd=run_dir.parent)
    assert result.returncode == 2
    assert "started with seed = 0" in result.stderr


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['tempo-engine', '--help']\n"
        "try:\n import tempo_em.cli as cli; cli.main()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("False")
    assert "train" in result.stdout


def test_recipes_are_listed_and_copied(tmp_path: Path) -> None:
    listed = tempo("recipes", cwd=tmp_path)
    assert all(word in listed.stdout for word in ("quickstart", "tiny", "tempo_pure", "ttrl"))
    assert tempo("recipes", "--copy", "tiny", cwd=tmp_path).returncode == 0
    assert tempo("train", "tiny.yaml", "--dry-run", cwd=tmp_path).returncode == 0
    assert tempo("recipes", "--copy", "tiny", cwd=tmp_path).returncode == 2


def test_data_sets_are_listed_with_commit_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command() == 0
    listed = capsys.readouterr().out
    assert "aime_2025" in listed
    assert "math-ai/aime25@563bb840; licence: " in listed


def test_a_dry_run_builds_everything_and_writes_nothing(tmp_path: Path) -> None:
    result = tempo("train", "quickstart", "--dry-run", "--set", "method=ttrl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "posterior: majority_vote  # preset ttrl" in result.stdout
    assert list(tmp_path.iterdir()) == []


def bad_inputs(folder: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Recipes that cannot work, and a part of the sentence that says so."""
    data = yaml.safe_load(packaged("recipes")["tiny"])["data"]
    (folder / "broken.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\nnot json\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "unanswered.jsonl").write_text('{"prompt": "1 + 1"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "word " * 500, "answer": "1"}) + "\n")
    (folder / "chat.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}) + "\n"
    )
    LlamaConfig(vocab_size=8).save_pretrained(folder / "weightless")

    def source(name: str, **more: object) -> dict[str, object]:
        return {"data": {**data, "labelled": {"jsonl": name, **more}}, "cold_start": {}}

    return {
        "typo": ({"rollout": {"max_new_token": 3}}, "did you mean max_new_tokens?"),
        "missing file": (source("nowhere.jsonl"), "does not exist"),
        "line without JSON": (source("broken.jsonl"), "line 2 is not JSON"),
        "empty data set": (source("empty.jsonl"), "holds no questions"),
        "missing column": (source("unanswered.jsonl"), "has no column 'answer'"),
        "labels missing": (source("unanswered.jsonl", answer=None), "needs answers"),
        "long prompt": (source("long.jsonl"), "the limit rollout.max_prompt_tokens is 8"),
        "chat without template": (source("chat.jsonl"), "no chat template"),
        "no such model": ({"model": {"path": "nowhere"}}, "config.json does not exist"),
        "model without weights": ({"model": {"path": "weightless"}}, "no *.safetensors weights"),
        "no critic there": (
            {"critic": {"path": "nowhere"}, "cold_start": {}},
            "nowhere is not a Hugging Face model directory",
        ),
        "positions": ({"rollout": {"max_prompt_tokens": 30, "max_new_tokens": 30}}, "takes 32 positions"),
        "too many questions": (
            {"data": {**data, "unlabelled": {"generator": "signs", "count": 999, "terms": [2], "largest": 2}}},
            "lower count",
        ),
        "a stop of two words": (
            {"rollout": {"max_prompt_tokens": 8, "max_new_tokens": 8, "stop": ["\n"]}},
            "rollout.stop takes texts that are one token each, '\\n' is not",
        ),
        "words of another task": (
            {"cold_start": {"steps": 5, "task": {"generator": "sums"}}},
            "cold_start.task has words that the tokenizer does not know, such as",
        ),
        "trace kind": ({"cold_start": {"steps": 5, "mix": {"wrong": 1.0}}}, "this generator writes right, miss, fudge"),
    }


def test_bad_input_is_one_sentence_exit_code_2_and_no_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for case, (changes, sentence) in bad_inputs(tmp_path).items():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny(**changes)))
        assert train_command("recipe.yaml", [], None, Path("run"), None, False) == 2, case
        said = capsys.readouterr().err
        assert sentence in said, case
        assert len(said.strip().splitlines()) == 1, case
        assert not (tmp_path / "run").exists(), case


def test_bad_input_from_the_shell_shows_no_traceback(tmp_path: Path) -> None:
    result = tempo("train", "tiny", "--set", "data.labelled={jsonl: nowhere.jsonl}", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"tempo-engine: the data file {tmp_path / 'nowhere.jsonl'} does not exist\n"
    assert list(tmp_path.iterdir()) == []


def test_a_shared_question_between_labelled_and_unlabelled_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": 2}) + "\n")
    data = {
        "labelled": {"jsonl": "a.jsonl", "extract": "whole"},
        "unlabelled": {"jsonl": "b.jsonl", "extract": "whole"},
    }
    recipe = tiny(data=data, cold_start={}, rollout={"max_prompt_tokens": 16, "max_new_tokens": 8})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = tempo("train", "recipe.yaml", "--dry-run", cwd=tmp_path)
    assert result.returncode == 2
    assert "share a question" in result.stderr


def test_usage_mistakes_exit_with_2(tmp_path: Path) -> None:
    for arguments in (["train"], ["train", "tiny", "--sett", "a=b"], ["trian"], ["eval", "nowhere"]):
        assert tempo(*arguments, cwd=tmp_path).returncode == 2


def test_text_questions_from_files_train_with_a_byte_tokenizer(tmp_path: Path) -> None:
    for name, numbers in (("labelled", range(8)), ("unlabelled", range(8, 12))):
        rows = [{"question": f"{n} + 1 =", "gold": n + 1} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    column = {"prompt": "question", "answer": "gold", "extract": "answer_line"}
    data = {
        "labelled": {"jsonl": "labelled.jsonl", **column},
        "unlabelled": {"jsonl": "unlabelled.jsonl", **column, "answer": None},
    }
    short = {"em": {"iterations": 1, "rollouts": 16}, "evaluation": {"samples": 2}, "cold_start": {}}
    recipe = tiny(data=data, rollout={"max_prompt_tokens": 16, "max_new_tokens": 8}, **short)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = tempo("train", "recipe.yaml", "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stages"]["final"] == {}, "without hidden answers there is nothing to audit"
