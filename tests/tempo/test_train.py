"""Options of a run that other tests leave at their defaults."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tempo_em.train import Training
from tempo_engine.checkpoint import list_checkpoints, names
from tempo_engine.errors import NonFinite

Train = Callable[..., Training]


def rows(training: Training) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (training.run_dir / "metrics.jsonl").read_text().splitlines()]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_whose_gradients_are_not_finite_stops_and_keeps_the_batch(prepare: Train) -> None:
    training = prepare("mstep.optim.max_skipped=2")
    with torch.no_grad():
        training.loop.policy.head.weight[3] = torch.nan
    with pytest.raises(NonFinite) as stop:
        training.run()
    (path,) = training.run_dir.glob("nonfinite-*.safetensors")
    assert str(path) in stop.value.__notes__[0]
    batch = load_file(path)
    assert len(batch["advantage_T"]) == int(batch["cu_responses_S1"][-1])
    assert not (training.run_dir / "summary.json").exists()


def test_saving_in_the_background_changes_nothing_but_when_files_appear(train: Train, weights: Callable) -> None:
    every = ("checkpoint.every=1", "em.iterations=3")
    plain, background = train(*every), train(*every, "checkpoint.asynchronous=true")
    assert same(weights(plain), weights(background))
    saved = [[path.name for path in list_checkpoints(t.run_dir / "checkpoints")] for t in (plain, background)]
    assert saved[0] == saved[1] != []


def test_a_kl_run_keeps_its_reference_in_the_checkpoint(train: Train) -> None:
    training = train("mstep.kl_coef=0.1", "mstep.epochs=2")
    assert training.loop.reference is not None
    reference = dict(training.loop.reference.model.named_parameters())
    policy = dict(training.loop.policy.parameters())
    assert any(not torch.equal(reference[name], p) for name, p in policy.items())
    saved = names(list_checkpoints(training.run_dir / "checkpoints")[-1])
    assert {f"reference/{name}" for name in policy} <= set(saved)
    assert all(row["actor/kl_loss"] >= 0 for row in rows(training) if row.get("stage") == "em")


def test_weights_are_saved_in_float32_when_the_model_computes_in_bfloat16(train: Train) -> None:
    """Also after a critic on the policy's trunk has read it without a backward."""
    training = train("model.dtype=bfloat16", "critic.backbone=shared", "em.iterations=1")
    (file,) = list_checkpoints(training.run_dir / "checkpoints")[-1].glob("*.safetensors")
    saved = {name: tensor.dtype for name, tensor in load_file(file).items() if name.startswith(("policy/", "critic/"))}
    assert set(saved.values()) == {torch.float32}


def test_adapters_train_while_the_weights_stay(train: Train) -> None:
    training = train("model.lora={rank: 4, alpha: 8}")
    trained = [name for name, _ in training.loop.policy.parameters()]
    assert trained
    assert all(".lora_" in name for name in trained)
    b = [p for name, p in training.loop.policy.parameters() if ".lora_B." in name]
    assert any(p.any() for p in b), "the adapters moved"
    saved = names(list_checkpoints(training.run_dir / "checkpoints")[-1])
    assert not any(name.startswith("policy/") and "lora" not in name for name in saved)


def test_recomputing_blocks_gives_the_same_run(train: Train, weights: Callable) -> None:
    """On a CPU the same operations run again, so even the bits are the same."""
    settings = ("cold_start.steps=20",)  # model settings do not begin where another run began
    plain = train(*settings, "model.activation_checkpointing=off")
    full = train(*settings, "model.activation_checkpointing=full")
    assert same(weights(plain), weights(full))


@pytest.mark.parametrize("loss", ["gspo", "reinforce"])
def test_staleness_is_corrected_over_several_epochs(train: Train, loss: str) -> None:
    training = train("mstep.importance=sequence", "mstep.epochs=2", "mstep.minibatches=4", f"mstep.loss={loss}")
    assert all(row["actor/grad_norm"] > 0 for row in rows(training) if row.get("stage") == "em")
