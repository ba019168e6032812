"""`tempo-engine doctor --mismatch`: no drift where there is none; what is disturbed on purpose is found, by token and layer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tempo_em.build import Parts, build
from tempo_em.commands import doctor_command
from tempo_em.doctor import Verdict, beyond, examine, without_learning
from tempo_engine.divergence import TOLERANCES
from tempo_engine.model import Policy
from torch import nn

Examine = Callable[..., Verdict]
FLOAT32, BFLOAT16 = TOLERANCES[torch.float32], TOLERANCES[torch.bfloat16]


def row(mean: float = 0.0, largest: float = 0.0, kl: float = 0.0) -> dict[str, float]:
    return {"logprob_diff_mean": mean, "logprob_diff_max": largest, "mismatch_kl": kl}


def disturbed_while_decoding(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A pre-hook: what enters the block is wrong while the local sampler goes on from its cache. The trainer uses none, and a
    prefill has more than one token."""
    is_decoding = kwargs.get("past_key_values") is not None and args[0].shape[1] == 1
    return ((args[0] * 1.5 + 1, *args[1:]) if is_decoding else args), kwargs


def block(policy: Policy, number: int) -> nn.Module:
    return policy.model.get_submodule(f"model.layers.{number}")


# --- In this process ----------------------------------------------------------------------------------------------------------


def test_the_local_sampler_does_not_drift_and_nothing_is_written_but_the_file_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor_command("tiny", ["rollout.temperature=0.7"], True, 3, Path("found.json")) == 0
    printed = capsys.readouterr().out
    assert printed.count("iteration ") == 3
    assert "no drift: what differs is rounding in float32" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    found = json.loads(Path("found.json").read_text())
    assert (found["drift"], found["token"], found["layer"], found["sampler"]) == ("", None, None, "local")
    assert [r["logprob_diff_max"] < 1e-5 for r in found["iterations"]] == [True] * 3


@pytest.mark.parametrize(
    "settings", [["model.dtype=bfloat16"], ["method=ttrl"], ["method=rlvr", "critic.backbone=shared", "rollout.max_running=8"]]
)  # fmt: skip
def test_no_setting_of_a_recipe_makes_it_drift(settings: list[str], tmp_path: Path) -> None:
    parts = build(without_learning("tiny", settings).recipe)
    before = {name: p.detach().clone() for name, p in parts.loop.policy.parameters()}
    verdict = examine(parts, 2, tmp_path, print)
    assert not verdict.drift
    assert parts.loop.policy.version == 2, "updates must have been made"
    assert all(torch.equal(before[name], p) for name, p in parts.loop.policy.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_that_is_wrong_while_sampling_is_found_with_the_first_token_it_spoils(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is read rightly, so the first token is; the second one is the first that is not. Of a trained model's size of
    weights, or the logits would hardly feel it."""
    settings = [f"model.dtype={dtype}", "model.create.initializer_range=0.3"]
    parts = build(without_learning("tiny", settings).recipe)
    block(parts.loop.policy, 1).register_forward_pre_hook(disturbed_while_decoding, with_kwargs=True)
    verdict = examine(parts, 3, tmp_path, print)
    assert verdict.drift
    assert len(verdict.iterations) == 1, "there is no need to go on"
    token, layer = verdict.token, verdict.layer
    assert token is not None
    assert token["position"] == 1
    assert token["text"] == parts.tokenizer.decode([token["id"]])
    assert abs(token["sampler_logprob"] - token["trainer_logprob"]) > verdict.tolerance.token
    assert layer is not None
    assert (layer.name, layer.block) == ("model.layers.1.input_layernorm", 1)
    printed = capsys.readouterr().out
    assert f"first diverging token: prompt {token['prompt']}, sample {token['sample']}, position 1" in printed
    assert "first diverging layer: model.layers.1.input_layernorm (block 1)" in printed


def test_a_difference_after_the_last_layer_is_said_to_be_there(tmp_path: Path) -> None:
    parts = build(without_learning("tiny", ["model.create.initializer_range=0.3"]).recipe)
    parts.loop.policy.temperature = 0.5  # the sampler goes on with 1
    verdict = examine(parts, 1, tmp_path, print)
    assert verdict.token is not None
    assert verdict.layer is None
    assert "no layer differs by more than 0.0001" in verdict.note


def test_drift_ends_with_exit_code_1_and_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_wrong(recipe: Any) -> Parts:
        parts = build(recipe)
        block(parts.loop.policy, 0).register_forward_pre_hook(disturbed_while_decoding, with_kwargs=True)
        return parts

    monkeypatch.setattr("tempo_em.doctor.build", build_wrong)
    file = tmp_path / "found.json"
    assert doctor_command("tiny", ["model.create.initializer_range=0.3"], True, 3, file) == 1
    found = json.loads(file.read_text())
    assert found["layer"]["block"] == 0
    assert found["token"]["position"] == 1
    assert found["layers"][0] == {"name": "model.embed_tokens", "block": None, "difference": 0.0, "position": 0}


def test_bounds_are_those_of_the_dtype() -> None:
    assert beyond([row(mean=1e-6, largest=9e-5)], FLOAT32) == ""
    assert beyond([row(mean=1e-6, largest=2e-4)], FLOAT32).startswith("max |d| is 0.0002")
    assert beyond([row(mean=0.02, largest=0.4, kl=1e-3)], BFLOAT16) == ""
    assert beyond([row(mean=0.02, largest=0.4, kl=0.02)], BFLOAT16).startswith("kl is 0.02")
    assert beyond([row(mean=0.06, largest=0.4, kl=1e-3)], BFLOAT16).startswith("mean |d| is 0.06")
    assert beyond([row(mean=float("nan"))], BFLOAT16)


def test_what_grows_from_iteration_to_iteration_is_drift_within_the_bounds_too() -> None:
    means = (0.004, 0.007, 0.011)
    assert (
        beyond([row(mean=m) for m in means], BFLOAT16) == "mean |d| grows, from 0.004 to 0.011, although nothing learns"
    )
    assert beyond([row(mean=m) for m in (0.004, 0.011, 0.007)], BFLOAT16) == ""
    assert beyond([row(mean=m) for m in (1e-8, 2e-8, 3e-8)], FLOAT32) == "", "too little to be looked at"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.yaml", [], True, 3, None), "the recipe nowhere.yaml does not exist"),
        (("tiny", [], True, 3, Path("/nowhere/x.json")), "the folder /nowhere does not exist"),
        (("tiny", ["rollout.temprature=1"], True, 3, None), "did you mean temperature"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence_and_exit_code_2(
    arguments: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_command(*arguments) == 2
    assert sentence in capsys.readouterr().err


# --- A real server ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """The parts of a run whose sampler is a server, started once."""
    torch.set_num_threads(1)
    settings = ["em.rollouts=16", "model.create.initializer_range=0.3"]
    parts = build(without_learning("tiny-sglang", settings).recipe)
    parts.loop.sampler.open(tmp_path_factory.mktemp("served"), parts.loop.policy)
    yield parts
    parts.loop.sampler.close()


def test_a_server_does_not_drift(served: Parts, tmp_path: Path) -> None:
    verdict = examine(served, 2, tmp_path, print)
    assert not verdict.drift
    assert max(r["logprob_diff_max"] for r in verdict.iterations) < 1e-4


def test_a_weight_that_changes_after_the_sync_is_named(
    served: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = served.loop
    weight = block(loop.policy, 1).get_parameter("mlp.down_proj.weight")
    synced, right = loop.sampler.load, weight.detach().clone()

    def load(policy: Policy) -> None:
        synced(policy)
        with torch.no_grad():
            weight.add_(1.0)

    monkeypatch.setattr(loop.sampler, "load", load)
    verdict = examine(served, 2, tmp_path, print)
    with torch.no_grad():
        weight.copy_(right)
    assert verdict.token is not None
    assert verdict.weights == ["model.layers.1.mlp.down_proj.weight"]
    assert "the servers hold another model.layers.1.mlp.down_proj.weight than the trainer" in capsys.readouterr().out


def test_a_block_that_computes_otherwise_than_the_server_s_is_found_in_its_dumps(served: Parts, tmp_path: Path) -> None:
    """From the seventh position on: what predicts the third token after a prompt of five. The last test with this server: it makes
    way for the one that dumps."""

    def disturbed_late(module: nn.Module, args: Any, kwargs: Any) -> Any:
        wrong = args[0].clone()
        wrong[:, 6:] = wrong[:, 6:] * 1.5 + 1
        return (wrong, *args[1:]), kwargs

    assert len(served.loop.unlabelled.next(1)[0].token_ids) == 5
    hook = block(served.loop.policy, 1).register_forward_pre_hook(disturbed_late, with_kwargs=True)
    verdict = examine(served, 2, tmp_path, print)
    hook.remove()
    assert verdict.weights == []
    assert verdict.token is not None
    assert verdict.token["position"] == 2
    assert verdict.layer is not None, verdict.note
    assert (verdict.layer.name, verdict.layer.position) == ("model.layers.1.input_layernorm", 6)
    agreeing = {layer.name: layer.difference for layer in verdict.layers if layer.block == 0}
    assert {"model.layers.0", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"} <= agreeing.keys()
    assert max(agreeing.values()) < 1e-5
