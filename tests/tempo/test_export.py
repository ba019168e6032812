"""`tempo-engine export`: what a run's checkpoints hold, as transformers reads it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tempo_em.commands import export_command
from tempo_em.train import Training
from tempo_engine import checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

IDS = torch.tensor([[3, 4, 5, 6]])
KEEP_ALL = ("em.iterations=3", "checkpoint.every=1", "checkpoint.keep=9")


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(run_dir / "checkpoints")]


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def test_the_newest_checkpoint_is_exported_as_models_that_say_what_the_run_does(
    train: Callable[..., Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = train("em.iterations=1")
    capsys.readouterr()
    assert export_command(training.run_dir, tmp_path / "out", None) == 0
    assert capsys.readouterr().out.split() == [
        word for name in ("policy", "critic", "README.md") for word in ("wrote", f"{tmp_path}/out/{name}")
    ]
    policy, critic = training.loop.policy, training.loop.critic
    assert critic is not None
    language_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "policy", attn_implementation="eager")
    classifier = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "out" / "critic", attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(language_model(input_ids=IDS).logits, policy.model(input_ids=IDS).logits)
        values = critic.trunk(input_ids=IDS).last_hidden_state @ critic.head.weight + critic.head.bias
        assert torch.allclose(classifier(input_ids=IDS).logits[..., 0], values, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "policy")
    assert tokenizer.get_vocab() == training.parts.tokenizer.get_vocab()


def test_a_run_without_a_critic_gives_a_policy_only(train: Callable[..., Training], tmp_path: Path) -> None:
    training = train("method=ttrl", "em.iterations=1", "initialisation.critic_warmup=0", "initialisation.rlvr=0")
    assert training.loop.critic is None
    assert export_command(training.run_dir, tmp_path / "out", None) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"policy", "README.md"}


def test_an_earlier_step_is_exported_when_asked_for(train: Callable[..., Training], tmp_path: Path) -> None:
    run_dir = train(*KEEP_ALL).run_dir
    first, *_, last = steps(run_dir)
    for step in (first, last):
        assert export_command(run_dir, tmp_path / str(step), step) == 0
        weights = {f"policy/{name}": torch.empty_like(t) for name, t in exported(tmp_path / str(step)).items()}
        checkpoint.load_tensors(run_dir / "checkpoints" / f"step-{step:08d}", weights)
        assert all(torch.equal(t, weights[f"policy/{name}"]) for name, t in exported(tmp_path / str(step)).items())
    name = "model.embed_tokens.weight"
    assert not torch.equal(exported(tmp_path / str(first))[name], exported(tmp_path / str(last))[name])


def test_a_damaged_newest_checkpoint_is_skipped_aloud_but_refused_when_asked_for(
    train: Callable[..., Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(*KEEP_ALL).run_dir
    before, last = steps(run_dir)[-2:]
    state = run_dir / "checkpoints" / f"step-{last:08d}" / "state.json"
    state.write_text(state.read_text() + " ")
    assert export_command(run_dir, tmp_path / "out", None) == 0
    assert f"skipping the damaged checkpoint {state.parent}" in capsys.readouterr().err
    assert export_command(run_dir, tmp_path / "before", before) == 0
    assert torch.equal(*(exported(tmp_path / name)["model.norm.weight"] for name in ("out", "before")))
    assert export_command(run_dir, tmp_path / "last", last) == 2
    assert f"the checkpoint of step {last} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "last").exists()


def test_mistakes_are_answered_at_the_door(
    train: Callable[..., Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train("em.iterations=1").run_dir
    known = ", ".join(map(str, steps(run_dir)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "recipe.yaml").write_text((run_dir / "recipe.yaml").read_text())
    for arguments, sentence in (
        ((tmp_path / "none", tmp_path / "out", None), "is not a run folder: it has no recipe.yaml"),
        ((tmp_path / "early", tmp_path / "out", None), "has no checkpoint yet; go on with it by"),
        ((run_dir, tmp_path / "full", None), "full is in use already; name a folder that is new or empty"),
        ((run_dir, tmp_path / "full" / "file", None), "file is in use already"),
        ((run_dir, tmp_path / "out", 999), f"has no checkpoint of step 999; it has those of {known}"),
    ):
        assert export_command(*arguments) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_run_of_two_processes_is_exported_by_one_as_by_itself(tmp_path: Path) -> None:
    settings = ("cold_start.steps=2", "em.iterations=1", "evaluation.samples=1", "initialisation.rlvr=0")
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "tempo_em", "train", "tiny", "--nproc", "2", "--run-dir", str(run_dir)]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert len(list(checkpoint.newest(run_dir / "checkpoints").glob("*.safetensors"))) == 2
    assert export_command(run_dir, tmp_path / "out", None) == 0
    for name in ("policy", "critic"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (tmp_path / "out", run_dir))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
