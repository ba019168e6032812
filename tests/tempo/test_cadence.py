"""When the critic is recalibrated and when the policy waits, by numbers given; then in runs."""

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tempo_em.cadence import AUROC, BRIER, KL, Cadence
from tempo_em.console import PlainDisplay
from tempo_em.recipe import AdaptiveRecipe, EStepRecipe, GateRecipe
from tempo_em.train import Training
from tempo_engine.errors import Interrupted
from tempo_engine.model import Policy
from tempo_engine.rollout import Rollout

Train = Callable[..., Training]


def cadence(every: int, *, gate: dict[str, Any] | None = None, **adaptive: Any) -> Cadence:
    return Cadence(EStepRecipe(every=every, adaptive=AdaptiveRecipe(**adaptive)), GateRecipe(**(gate or {})))


def recalibrates(watch: Cadence, name: str, values: list[float]) -> list[bool]:
    return [watch.decide({name: value}).recalibrates for value in values]


def test_without_a_reason_it_is_every_so_many_iterations() -> None:
    assert recalibrates(cadence(3), AUROC, [0.9, 0.1, 0.1, 0.9, 0.1, 0.1, 0.9]) == [
        True, False, False, True, False, False, True
    ]  # fmt: skip


def test_a_fall_of_the_auroc_below_its_band_recalibrates() -> None:
    """The first look after an E-step is the measure: 0.9, and after the second E-step 0.8."""
    watch = cadence(100, auroc_band=0.05)
    found = recalibrates(watch, AUROC, [0.7, 0.9, 0.86, 0.84, 0.8, 0.76, 0.95, 0.74])
    assert found == [True, False, False, True, False, False, False, True]


def test_a_rise_of_the_brier_score_above_its_band_recalibrates() -> None:
    watch = cadence(100, brier_band=0.05)
    assert recalibrates(watch, BRIER, [0.2, 0.1, 0.14, 0.16, 0.2]) == [True, False, False, True, False]


def test_a_policy_that_has_moved_recalibrates_and_says_why() -> None:
    watch = cadence(100, kl_budget=2.0)
    assert recalibrates(watch, KL, [math.nan, 0.5, 1.9]) == [True, False, False]
    decision = watch.decide({KL: 2.5})
    assert decision.recalibrates
    assert decision.notes == ("recalibrating after 3 iterations: critic/kl_since_e_step is 2.5",)


def test_the_longest_interval_holds_and_needs_no_explanation() -> None:
    watch = cadence(2, auroc_band=0.05)
    decisions = [watch.decide({AUROC: 0.9}) for _ in range(5)]
    assert [d.recalibrates for d in decisions] == [True, False, True, False, True]
    assert not any(d.notes for d in decisions)


def test_what_cannot_be_measured_decides_nothing() -> None:
    """All responses right, say: the look after it becomes the measure."""
    watch = cadence(100, auroc_band=0.05, gate={"auroc_below": 0.6})
    assert recalibrates(watch, AUROC, [0.9, math.nan, 0.9, math.nan, 0.84]) == [True, False, False, False, True]
    assert not watch.waits


def test_the_policy_waits_for_the_critic_and_the_critic_is_recalibrated_meanwhile() -> None:
    watch = cadence(100, gate={"auroc_below": 0.7})
    decisions = [watch.decide({AUROC: auroc}) for auroc in (0.8, 0.8, 0.69, math.nan, 0.6, 0.7, 0.8)]
    assert [d.waits for d in decisions] == [False, False, True, True, True, False, False]
    assert [d.recalibrates for d in decisions] == [True, False, True, True, True, False, False]
    assert [d.metrics["actor/waits"] for d in decisions] == [0, 0, 1, 1, 1, 0, 0]
    notes = [note for d in decisions for note in d.notes]
    assert len(notes) == 2, "once when it begins to wait, once when it goes on"
    assert notes[0].startswith("the policy waits until the critic is better: critic/auroc_fresh is 0.690")
    assert notes[0].endswith("mstep.gate wants an AUROC of 0.7")
    assert notes[1].startswith("the policy goes on")


def test_either_bound_of_the_gate_is_enough() -> None:
    watch = cadence(1, gate={"auroc_below": 0.7, "brier_above": 0.2})
    assert not watch.decide({AUROC: 0.8, BRIER: 0.1}).waits
    assert watch.decide({AUROC: 0.8, BRIER: 0.3}).waits
    assert watch.decide({AUROC: 0.6, BRIER: 0.1}).waits


def test_the_kl_since_the_last_e_step_is_that_of_whole_responses(
    make_policy: Callable[..., Policy], make_rollouts: Callable[..., list[Rollout]]
) -> None:
    """Log-probs moved by hand: rho - 1 - log rho is 1 - ln 2 for rho = 2, ln 2 - 1/2 for rho = 1/2, and 0 for an unmoved policy."""
    watch, policy, rollouts = (
        cadence(100, kl_budget=1.0, kl_responses=2),
        make_policy(),
        make_rollouts([(3, 4), (2, 1), (1, 2)]),
    )
    rollouts = [Rollout(r.prompt, r.response_ids, r.logprobs, ((0, len(r.response_ids)),), False, "") for r in rollouts]
    assert watch.drift(policy, 64) == {}
    watch.drop_anchor(policy, rollouts, 64)
    assert [r.response_ids for r in watch.anchor] == [rollouts[0].response_ids, rollouts[2].response_ids]
    assert watch.drift(policy, 64)[KL] == pytest.approx(0.0, abs=1e-9)
    watch.anchor[0].logprobs[1] -= math.log(2)
    watch.anchor[1].logprobs[0] += math.log(2)
    assert watch.drift(policy, 64)[KL] == pytest.approx(((1 - math.log(2)) + (math.log(2) - 0.5)) / 2, rel=1e-5)


def test_its_state_comes_back_from_json() -> None:
    watch = cadence(100, auroc_band=0.05, gate={"auroc_below": 0.6})
    for auroc in (0.9, 0.8, 0.5):
        watch.decide({AUROC: auroc})
    again = cadence(100, auroc_band=0.05, gate={"auroc_below": 0.6})
    again.load_state(watch.state())
    assert again.state() == watch.state()
    assert [again.decide({AUROC: x}) for x in (0.8, 0.7)] == [watch.decide({AUROC: x}) for x in (0.8, 0.7)]


# --- In runs -------------------------------------------------------------------------------------------------------------------


def em_rows(training: Training) -> list[dict[str, Any]]:
    return [row for row in training.metrics.rows() if row.get("stage") == "em"]


def test_a_gate_that_no_critic_passes_keeps_the_policy_as_it_is(
    prepare: Train, weights: Callable[..., dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    training = prepare("mstep.gate.auroc_below=1.0", "estep.every=5", "em.iterations=3")
    before = weights(training)
    training.run()
    after = weights(training)
    assert all(torch.equal(after[name], w) for name, w in before.items() if not name.startswith("critic."))
    assert not all(torch.equal(after[name], w) for name, w in before.items() if name.startswith("critic."))
    assert all("critic/vf_loss" in row and "actor/pg_loss" not in row for row in em_rows(training))
    assert capsys.readouterr().out.count("the policy waits until the critic is better") == 1


def test_a_budget_of_kl_that_each_update_uses_up_recalibrates_each_iteration(train: Train) -> None:
    rows = em_rows(train("estep.adaptive.kl_budget=1.0e-9", "estep.every=10", "em.iterations=3"))
    assert ["critic/vf_loss" in row for row in rows] == [True, True, True]
    assert ["critic/kl_since_e_step" in row for row in rows] == [False, True, True]
    assert all(0 <= row["critic/brier_fresh"] <= 1 for row in rows)
    rows = em_rows(train("estep.adaptive.kl_budget=1.0e+9", "estep.every=10", "em.iterations=3"))
    assert ["critic/vf_loss" in row for row in rows] == [True, False, False]


def test_a_stopped_run_goes_on_with_its_frozen_critic_and_its_cadence(
    prepare: Train, weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    settings = ("em.posterior=frozen_critic", "estep.adaptive={brier_band: 0.0, kl_budget: 0.5}", "estep.every=9")
    whole = prepare(*settings, "em.iterations=4")
    whole.run()
    stopped = prepare(*settings, "em.iterations=4")
    stopped.interrupt = signal.SIGTERM
    with pytest.raises(Interrupted):
        stopped.run()
    again = Training(stopped.resolved, stopped.run_dir, PlainDisplay(), resume=True)
    again.run()
    assert again.loop.cadence.state() == whole.loop.cadence.state()
    assert again.loop.frozen_critic is not None
    assert whole.loop.frozen_critic is not None
    critics = zip(again.loop.frozen_critic.parameters(), whole.loop.frozen_critic.parameters(), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in critics)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(again).items())


def test_an_iteration_without_labelled_responses_is_no_e_step(prepare: Train) -> None:
    training = prepare("mstep.gate.auroc_below=0.6", "estep.every=3")
    loop, em = training.loop, training.parts.stages[-1]
    decision = loop.decide(em, [], torch.empty(0), 0)
    assert (decision.recalibrates, decision.waits, loop.cadence.since) == (False, False, None)
