"""What must hold whatever the numbers are: labels do not leak, switches mean what they say."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tempo_em.asking import Asking
from tempo_em.console import PlainDisplay
from tempo_em.datasets import Dataset, load_datasets
from tempo_em.loading import load_recipe
from tempo_em.presets import PRESETS
from tempo_em.recipe import Recipe
from tempo_em.schedule import EMLoop, Stage, advantages
from tempo_em.train import Training
from tempo_em.waiting import Sampled
from tempo_engine.errors import UserError
from tempo_engine.packing import PackedBatch, pack
from tempo_engine.rollout import Rollout
from tempo_engine.verify import ExactMatch
from tempo_kernels import group_advantage
from torch import Tensor

Train = Callable[..., Training]
Weights = Callable[[Training], dict[str, Tensor]]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stage(training: Training, name: str) -> Stage:
    return next(s for s in training.parts.stages if s.name == name)


def asking(loop: EMLoop, em: Stage, key: str) -> Asking:
    loop.sampler.load(loop.policy)
    return Asking(loop, em, key, loop.cursors)


VOTING = ("ttrl", "empo", "empo_band")
ON_LABELS = ("rlvr", "supervised_continuation", "grpo", "dapo")
LABEL_FREE = ("tempo", "tempo_pure", "ttrl", "empo", "frozen_critic", "rlvr")


def corrupt_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer of the unlabelled questions becomes a wrong one, before anything is built of them."""

    def corrupted(recipe: Recipe) -> dict[str, Dataset]:
        datasets = load_datasets(recipe)
        wrong = [replace(question, answers=frozenset({"+9"})) for question in datasets["unlabelled"].questions]
        return datasets | {"unlabelled": replace(datasets["unlabelled"], questions=wrong)}

    monkeypatch.setattr("tempo_em.build.load_datasets", corrupted)


@pytest.mark.parametrize("method", LABEL_FREE)
def test_corrupting_every_answer_of_the_unlabelled_questions_leaves_all_weights_bit_identical(
    monkeypatch: pytest.MonkeyPatch, train: Train, weights: Weights, method: str
) -> None:
    """I5: the audit's answers may change its metrics, never a weight."""
    honest = train(f"method={method}")
    corrupt_the_answers(monkeypatch)
    deceived = train(f"method={method}")
    assert same(weights(honest), weights(deceived))
    audit = [t.evaluations["final"]["unlabelled"]["mean@4"] for t in (honest, deceived)]
    assert audit[1] == 0.0, "the corruption must have reached the audit"


def test_responses_are_trained_on_as_the_tokens_that_were_sampled(
    monkeypatch: pytest.MonkeyPatch, prepare: Callable[..., Training]
) -> None:
    """Token in, token out: text is decoded for verifiers, and never tokenised again."""
    training = prepare("em.iterations=1")
    sampled, packed = [], []
    sample = training.loop.sampler.sample

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was tokenised while a run samples and trains")

    def remember(*args: Any, **options: Any) -> list[Rollout]:
        rollouts = sample(*args, **options)
        sampled.extend(tuple(r.response_ids) for r in rollouts)
        return [replace(r, text=f"{r.text} !") for r in rollouts]  # a text that these tokens do not spell

    def watch(rollouts: list[Rollout], *args: Any, **options: Any) -> PackedBatch:
        batch = pack(rollouts, *args, **options)
        ends = batch.cu_responses_S1.tolist()
        packed.extend(tuple(batch.target_T[a:b].tolist()) for a, b in itertools.pairwise(ends))
        return batch

    for name in ("__call__", "encode", "_encode_plus"):
        monkeypatch.setattr(type(training.parts.tokenizer), name, refuse)
    monkeypatch.setattr(training.loop.sampler, "sample", remember)
    monkeypatch.setattr("tempo_em.schedule.pack", watch)
    training.loop.iterate(stage(training, "em"), 0)
    assert packed
    assert set(packed) <= set(sampled)


def test_only_the_oracle_trains_on_answers_of_unlabelled_questions(
    monkeypatch: pytest.MonkeyPatch, train: Train, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = train("method=oracle")
    assert "answers of data.unlabelled reach training" in capsys.readouterr().out
    corrupt_the_answers(monkeypatch)
    assert not same(weights(honest), weights(train("method=oracle")))


def test_the_m_step_has_no_labels_of_unlabelled_questions_in_reach(prepare: Train) -> None:
    loop = prepare().loop
    assert loop.oracle is None
    assert all(not hasattr(prompt, name) for prompt in loop.unlabelled.items for name in ("answers", "columns"))
    # Their verifier is there to read answers out of responses; it is told labels with each question and keeps none.
    assert {name for name, value in vars(loop).items() if isinstance(value, ExactMatch)} == {"verifier"}
    assert "EvaluationSet" not in {type(value).__name__ for value in vars(loop).values()}


def test_frozen_critic_is_the_e_step_skipped_is_a_learning_rate_of_zero(train: Train, weights: Weights) -> None:
    """I6: three ways to say that the critic stays as it is; with weight decay, which a rate of 0 must switch off too."""
    frozen = train("method=frozen_critic")
    skipped = train("estep.every=0")
    no_rate = train("estep.optim.lr=0", "estep.optim.weight_decay=0.1")
    assert same(weights(frozen), weights(skipped))
    assert same(weights(frozen), weights(no_rate))
    assert not same(weights(frozen), weights(train()))


def test_a_posterior_frozen_critic_without_e_step_is_the_frozen_critic(
    train: Train, prepare: Train, weights: Weights
) -> None:
    """A copy is kept only beside a critic that moves, and then it does not move with it."""
    assert same(weights(train("method=frozen_critic")), weights(train("estep.every=0", "em.posterior=critic")))
    both = prepare("em.posterior=frozen_critic")
    begun = weights(both)
    both.run()
    frozen, fitted = both.loop.frozen_critic, both.loop.critic
    assert frozen is not None
    assert fitted is not None
    assert all(torch.equal(p, begun[f"critic.{name}"]) for name, p in frozen.parameters())
    assert not all(torch.equal(p, begun[f"critic.{name}"]) for name, p in fitted.parameters())
    assert not same(weights(both), weights(train()))


def test_the_critic_learns_nothing_without_labelled_rows(prepare: Train) -> None:
    """I4: an E-step without labelled rows changes no parameter, weight decay included."""
    loop = prepare("estep.optim.weight_decay=0.1").loop
    assert loop.critic is not None
    before = [p.detach().clone() for _, p in loop.critic.parameters()]
    assert loop.e_step(Sampled([], [], None, [], 0, 0, {}), "em/0") == {}
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, loop.critic.parameters(), strict=True))


def test_the_critic_is_the_same_however_many_unlabelled_responses_there_are(train: Train, weights: Weights) -> None:
    """I4: with the policy at rest, 32 labelled rows give the same critic beside 32 and beside 64 unlabelled rows."""
    few = train("mstep.optim.lr=0", "em.rollouts=64", "em.labelled_share=0.5")
    many = train("mstep.optim.lr=0", "em.rollouts=96", "em.labelled_share=0.33333334")
    assert few.loop.labelled.position == many.loop.labelled.position
    assert few.loop.unlabelled.position < many.loop.unlabelled.position
    assert same(weights(few), weights(many))


def test_zero_variance_groups_are_filtered_and_refilled_among_labelled_rows_only(prepare: Train) -> None:
    """I7: labelled groups without signal are replaced, unlabelled ones never are; the batch has exactly B n rows."""
    training = prepare("estep.filter=zero_variance")
    em = stage(training, "em")
    asks = asking(training.loop, em, "em/0")
    labelled, rewards, _ = asks.labelled()
    groups = torch.tensor(rewards).view(-1, 2)
    assert len(labelled) == 32
    assert (groups[:, 0] != groups[:, 1]).all()
    assert len(asks.unlabelled()) == 32


def test_a_labelled_set_without_signal_ends_the_refilling(prepare: Train) -> None:
    training = prepare("estep.filter=zero_variance", "cold_start.steps=0")  # an untrained policy is never right
    labelled, rewards, _ = asking(training.loop, stage(training, "em"), "em/0").labelled()
    assert labelled == []
    assert rewards == []


def sampled(loop: EMLoop, em: Stage) -> tuple[Any, Tensor, Tensor]:
    asks = asking(loop, em, "k")
    labelled, _, _ = asks.labelled()
    rollouts = [*asks.unlabelled(), *labelled]
    batch = pack(rollouts)
    return batch, loop.values(batch), torch.arange(len(rollouts)) >= len(rollouts) - len(labelled)


def test_each_population_is_whitened_by_itself(prepare: Train) -> None:
    training = prepare()
    loop, em = training.loop, stage(training, "em")
    assert loop.critic is not None
    loop.critic.head.weight.data.normal_()
    batch, value_TS, is_labelled_S = sampled(loop, em)
    outcome_S = torch.rand(len(batch))
    advantage_T, _ = advantages(em, outcome_S, value_TS, batch, torch.arange(len(batch)), is_labelled_S)
    labelled_T = is_labelled_S.repeat_interleave(batch.response_length_S)
    for population in (advantage_T[labelled_T], advantage_T[~labelled_T]):
        assert abs(float(population.mean())) < 1e-5
        assert abs(float(population.std()) - 1) < 1e-4


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_trains_and_reports(train: Train, weights: Weights, method: str) -> None:
    no_filter = ("estep.filter=none",) if method == "tempo_released" else ()  # the tiny policy is hardly ever right
    training = train(f"method={method}", *no_filter)
    rows = training.metrics.rows()
    em = [row for row in rows if row.get("stage") == "em"]
    assert len(em) == 2
    assert all(torch.isfinite(w).all() for w in weights(training).values())
    recalibrates = training.recipe.estep.every > 0
    assert all(("critic/vf_loss" in row) == recalibrates for row in em)
    is_voting, is_on_labels = method in VOTING, method in ON_LABELS
    labelled_share = 0.0 if is_voting else 1.0 if is_on_labels else 0.5
    assert training.recipe.em.labelled_share == labelled_share
    assert all(row["rollout/labelled_share"] == labelled_share for row in em if "rollout/labelled_share" in row)
    assert training.parts.stages[-1].trains_on_labelled == (not is_voting and method != "tempo_pure")
    assert training.evaluations["final"]["unlabelled"].keys() >= {"mean@4", "pass@4", "maj@4", "distinct_answers"}
    assert training.tokens["em_generated"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        ("em.order=lagged", "em.terminal=last_prefix"),
        ("critic.target=plus_minus_one", "estep.clip=sequence_mean", "mstep.normalise=whiten"),
        ("critic.head=sigmoid", "critic.loss=bce", "mstep.loss=gspo"),
        ("critic.heads=3", "critic.pessimism=1.0", "em.posterior=frozen_critic"),
        ("critic.backbone=shared", "mstep.loss=reinforce", "mstep.normalise=scale_per_population"),
        (
            "em.posterior=random",
            "mstep.baseline=none",
            "mstep.normalise=none",
            "mstep.entropy_coef=0.01",
            "estep.every=0",
        ),
        ("estep.every=2", "mstep.baseline=group_mean", "mstep.old_logprob=sampler", "mstep.dual_clip=3"),
    ],
)
def test_switches_combine_freely(train: Train, weights: Weights, settings: tuple[str, ...]) -> None:
    training = train(*settings)
    assert all(torch.isfinite(w).all() for w in weights(training).values())
    assert training.loop.policy.version > 0


def test_votes_are_put_on_the_scale_of_the_critics_targets(prepare: Train) -> None:
    training = prepare("em.posterior=majority_vote", "critic.target=plus_minus_one")
    em = stage(training, "em")
    rollouts = Sampled([], [], None, [], 0, 0, {}, [0.0, 1.0, 0.25])
    assert training.loop.to_target(torch.tensor(rollouts.beliefs)).tolist() == [-1.0, 1.0, -0.5]
    asks = asking(training.loop, em, "k")
    batch = asks.unlabelled()
    outcome_S = training.loop.posterior(
        em, replace(rollouts, unlabelled=batch, beliefs=asks.beliefs), None, pack(batch)
    )
    assert set(outcome_S.tolist()) <= {-1.0, 1.0}


def test_lagged_and_fresh_values_differ(train: Train, weights: Weights) -> None:
    assert not same(weights(train("em.order=e_then_m")), weights(train("em.order=lagged")))


def test_recalibration_follows_its_cadence(train: Train) -> None:
    rows = train("em.iterations=4", "estep.every=3").metrics.rows()
    assert ["critic/vf_loss" in row for row in rows if row.get("stage") == "em"] == [True, False, False, True]


def test_a_voting_method_without_initialisation_holds_no_critic(train: Train) -> None:
    training = train("method=ttrl", "initialisation.critic_warmup=0", "initialisation.rlvr=0")
    assert training.loop.critic is None
    assert "critic/auroc" not in training.evaluations["final"]["unlabelled"]


def test_sampler_and_trainer_log_probs_agree_during_training(train: Train) -> None:
    gaps = [row["rollout/logprob_diff_max"] for row in train().metrics.rows() if "rollout/logprob_diff_max" in row]
    assert gaps
    assert all(isinstance(gap, float) and gap < 1e-4 for gap in gaps)


def test_the_critic_begins_with_what_the_cold_start_taught_the_policy(train: Train, weights: Weights) -> None:
    training = train("initialisation.critic_warmup=0", "initialisation.rlvr=0", "em.iterations=0")
    assert training.loop.critic is not None
    policy, critic = training.loop.policy.trunk.state_dict(), training.loop.critic.trunk.state_dict()
    assert same(policy, critic)
    assert not training.loop.critic.head.weight.any()


def test_the_initialisation_uses_the_token_critic_whatever_the_method(prepare: Train) -> None:
    rlvr = stage(prepare("method=ttrl"), "rlvr")
    assert (rlvr.posterior, rlvr.baseline, rlvr.labelled_share) == ("label", "critic_prefix", 1.0)


def test_groups_of_both_populations_stay_apart(monkeypatch: pytest.MonkeyPatch, prepare: Train) -> None:
    """Unlabelled groups of 4 and labelled groups of 3 in one batch are never mixed."""
    training = prepare(
        "mstep.baseline=group_mean", "mstep.normalise=none", "em.group_size=4", "em.labelled_group_size=3",
        "em.posterior=random", "estep.every=0", "em.rollouts=40",
    )  # fmt: skip
    loop, em = training.loop, stage(training, "em")
    asks = asking(loop, em, "k")
    labelled, rewards, _ = asks.labelled()
    unlabelled = asks.unlabelled()
    groups: list[Tensor] = []

    def spy(outcome_S: Tensor, group_S: Tensor, *, divide_by_std: bool) -> Tensor:
        groups.append(group_S)
        return group_advantage(outcome_S, group_S, divide_by_std=divide_by_std)

    monkeypatch.setattr("tempo_em.schedule.group_advantage", spy)
    sampled = Sampled(labelled, rewards, None, unlabelled, 0, 0, {}, asks.beliefs)
    loop.m_step(em, loop.score(em, labelled, unlabelled, 0), sampled, "k")
    assert groups[0].bincount().tolist() == [4] * (len(unlabelled) // 4) + [3] * (len(labelled) // 3)


def test_starting_from_a_run_without_a_critic_is_refused_before_a_folder_exists(train: Train, tmp_path: Path) -> None:
    no_critic = ("initialisation.critic_warmup=0", "initialisation.rlvr=0")
    voted = train("method=ttrl", *no_critic, "em.iterations=0")
    resolved = load_recipe("tiny", ["cold_start.steps=20", *no_critic])
    with pytest.raises(UserError, match="has no critic"):
        Training(resolved, tmp_path / "new", PlainDisplay(), resume=False, start_from=voted.run_dir)
    assert not (tmp_path / "new").exists()
