"""The EM loop. One iteration reads as the paper's Algorithm 1 (arXiv 2604.19295); every method is a setting of its switches."""

# Shape letters: T = packed response tokens, S = sequences
import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tempo_engine import parallel
from tempo_engine.cursor import Cursor
from tempo_engine.errors import Halted
from tempo_engine.metrics import auroc, brier
from tempo_engine.mismatch import mismatch
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import PackedBatch, pack
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.samplers import Sampler
from tempo_engine.tasks.answers import Extract
from tempo_engine.tracking import Clock
from tempo_engine.updates import CriticUpdate, PolicyUpdate, fit_critic, improve_policy
from tempo_engine.verify import Verifier
from tempo_kernels import advantage, group_advantage, moments, whiten
from tempo_kernels.segments import segment_ids
from torch import Tensor

from tempo_em import posteriors
from tempo_em.ahead import Ahead
from tempo_em.asking import Asking, without_stale_groups
from tempo_em.cadence import AUROC, BRIER, Cadence, Decision
from tempo_em.posteriors import Oracle
from tempo_em.recipe import Recipe
from tempo_em.transfer import Transfer
from tempo_em.waiting import Sampled, Waiting


@dataclass(frozen=True)
class Stage:
    """A stretch of iterations with the same switches: critic warm-up, RLVR initialisation and the EM loop are all this."""

    name: str
    iterations: int
    labelled_share: float
    posterior: str
    improves_policy: bool
    trains_on_labelled: bool
    recalibrates_every: int
    baseline: str
    normalise: str
    is_watched: bool = False  # by `Cadence`: adaptive E-steps, a policy that may have to wait

    @property
    def reads_critic(self) -> bool:
        """Whether the M-step needs values: as outcome, or as baseline."""
        return self.posterior in ("critic", "frozen_critic") or self.baseline == "critic_prefix"


@dataclass(frozen=True)
class Scored:
    """The M-step's rows, the denominator of its ratio, [T], and how it is to update. No rows: None."""

    batch: PackedBatch | None
    old_logprob_T: Tensor | None
    update: PolicyUpdate
    metrics: dict[str, float]


@dataclass
class EMLoop:
    """The parts an iteration works with. `unlabelled` yields Prompts: there is no label in reach of the M-step to leak, except
    under posterior oracle, for which alone there is an `oracle`.

    `frozen_critic`: the one that the EM loop began with, where it says the outcomes while `critic` is recalibrated.
    """

    recipe: Recipe
    policy: Policy
    critic: Critic | None
    reference: Policy | None
    sampler: Sampler
    labelled: Cursor[Labelled]
    unlabelled: Cursor[Prompt]
    verifier: Verifier  # of labelled responses
    extract_unlabelled: Extract
    policy_optimizer: Optimizer
    critic_optimizer: Optimizer | None
    policy_update: PolicyUpdate
    critic_update: CriticUpdate
    clock: Clock
    frozen_critic: Critic | None = None
    oracle: Oracle | None = None
    waiting: Waiting | None = None
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.ahead = Ahead(self.recipe.rollout.ahead)
        self.cadence = Cadence(self.recipe.estep, self.recipe.mstep.gate)

    def iterate(self, stage: Stage, iteration: int) -> dict[str, float]:
        """One EM iteration: sample from the policy, recalibrate the critic (E), refine the policy (M)."""
        key = f"{stage.name}/{iteration}"
        with self.clock.time("rollout"):
            sampled = self.sample(stage, iteration)
        labelled, unlabelled, reward_S = sampled.labelled, sampled.unlabelled, torch.tensor(sampled.rewards)
        metrics = rollout_metrics(labelled, unlabelled, self.policy.version)
        metrics |= {} if sampled.accuracy is None else {"critic/score/mean": sampled.accuracy}
        metrics |= {"rollout/responses": sampled.num_responses, "tokens/generated": sampled.num_tokens}
        scored = self.score(stage, labelled, unlabelled, iteration)
        decision = self.decide(stage, labelled, reward_S, iteration)
        metrics |= scored.metrics | decision.metrics
        if decision.recalibrates and self.recipe.em.order == "e_then_m":
            metrics |= self.e_step(sampled, key)
        if stage.improves_policy and not decision.waits:
            metrics |= self.m_step(stage, scored, sampled, key)
        if decision.recalibrates and self.recipe.em.order == "lagged":
            metrics |= self.e_step(sampled, key)
        return metrics

    # --- Rollouts ---

    def sample(self, stage: Stage, iteration: int) -> Sampled:
        """Rollouts from the current policy, or, sampled ahead, from one a few updates older; or those that a killed run had sampled
        for this very occasion."""
        key = f"{stage.name}/{iteration}"
        sampled = self.waiting and self.waiting.take(key, self.policy.version)
        if not sampled:
            self.sampler.load(self.policy)
            get = self.ahead_of if self.recipe.rollout.ahead else self.fresh
            sampled = (
                self.waiting.keep(key, self.policy.version, lambda: get(stage, iteration))
                if self.waiting
                else get(stage, iteration)
            )
        for name, cursor in self.cursors.items():
            cursor.position = sampled.cursors[name]
        return sampled

    @property
    def cursors(self) -> dict[str, Cursor[Any]]:
        return {"labelled": self.labelled, "unlabelled": self.unlabelled}

    def fresh(self, stage: Stage, iteration: int, cursors: dict[str, Cursor[Any]] | None = None) -> Sampled:
        """Sampled now. Without `cursors` the loop's own, which stay where they are."""
        cursors = cursors or {name: copy.copy(cursor) for name, cursor in self.cursors.items()}
        asking = Asking(self, stage, f"{stage.name}/{iteration}", cursors)
        labelled, rewards, accuracy = asking.labelled()
        unlabelled = asking.unlabelled()
        positions = {name: cursor.position for name, cursor in cursors.items()}
        count = asking.num_responses, asking.num_tokens
        return Sampled(labelled, rewards, accuracy, unlabelled, *count, positions, asking.beliefs)

    def ahead_of(self, stage: Stage, iteration: int) -> Sampled:
        """Sampled while earlier iterations trained. Groups older than the bound are left out: a server may have missed a sync."""

        def take() -> dict[str, Any]:
            sampled = self.ahead.take(
                stage.name,
                iteration,
                stage.iterations - 1,
                self.cursors,
                lambda i, cursors: self.fresh(stage, i, cursors),
            )
            oldest = self.policy.version - self.recipe.rollout.ahead
            return without_stale_groups(
                sampled, oldest, self.recipe.em.labelled_group_size, self.recipe.em.group_size
            ).to_json()

        return Sampled.from_json(parallel.from_main(take))

    def score(self, stage: Stage, labelled: list[Rollout], unlabelled: list[Rollout], iteration: int) -> "Scored":
        """The rows that the M-step trains on, packed, with log-probs under the policy as it is, and how far the sampler's are off.

        Raises Halted when that is more than the recipe allows.
        """
        rows = [*unlabelled, *(labelled if stage.trains_on_labelled else [])]
        if not stage.improves_policy or not rows:
            return Scored(None, None, self.policy_update, {})
        how, every = self.recipe.mstep, self.recipe.rollout.mismatch.every
        batch, metrics, update = pack(rows, self.policy.device), {}, self.policy_update
        logprob_T = batch.sampler_logprob_T
        looks = every > 0 and iteration % every == 0
        if how.old_logprob == "trainer" or looks:
            with self.clock.time("old_logprob"):
                logprob_T = self.policy.token_logprobs(batch, self.recipe.micro_batch_tokens)
        if looks:
            metrics, update = self.watch_mismatch(batch, logprob_T, rows)
        return Scored(batch, logprob_T if how.old_logprob == "trainer" else batch.sampler_logprob_T, update, metrics)

    def watch_mismatch(
        self, batch: PackedBatch, logprob_T: Tensor, rows: list[Rollout]
    ) -> tuple[dict[str, float], PolicyUpdate]:
        """Metrics, and the policy update, which corrects where the recipe says so. Older weights' log-probs differ rightly: bounds
        are for tokens of this version only."""
        how, update = self.recipe.rollout.mismatch, self.policy_update
        metrics = mismatch(batch.sampler_logprob_T, logprob_T, batch.cu_responses_S1, band=how.band)
        if any(r.oldest_version < self.policy.version for r in rows):
            return metrics, update
        kl = metrics["rollout/mismatch_kl"]
        said = f"sampler and trainer disagree: rollout/mismatch_kl is {kl:.3g}"
        if how.stop_above is not None and not kl <= how.stop_above:
            raise Halted(
                f"{said}, more than rollout.mismatch.stop_above ({how.stop_above:g}); `tempo-engine doctor --mismatch` says where"
            )
        if how.correct_above is not None and kl > how.correct_above and update.importance == "none":
            update = replace(update, importance="token")
            metrics["rollout/mismatch_corrected"] = 1.0
        if how.warn_above is not None and not kl <= how.warn_above:
            self.note(f"{said}, more than rollout.mismatch.warn_above ({how.warn_above:g})")
        return metrics, update

    # --- E and M ---

    def decide(self, stage: Stage, labelled: list[Rollout], reward_S: Tensor, iteration: int) -> Decision:
        """Whether to recalibrate, and whether the policy waits."""
        if not stage.is_watched:
            recalibrates = stage.recalibrates_every > 0 and iteration % stage.recalibrates_every == 0
            return Decision(recalibrates, False, self.look(labelled, reward_S) if recalibrates else {})
        if not labelled:  # the filter left none: nothing to look at, and nothing to fit
            return Decision(False, self.cadence.waits, {})
        budget = self.recipe.micro_batch_tokens
        fresh = self.look(labelled, reward_S, with_brier=True)
        decision = self.cadence.decide(fresh | self.cadence.drift(self.policy, budget))
        for text in decision.notes:
            self.note(f"iteration {iteration + 1}: {text}")
        if decision.recalibrates:
            self.cadence.drop_anchor(self.policy, labelled, budget)
        return decision

    def look(self, labelled: list[Rollout], reward_S: Tensor, *, with_brier: bool = False) -> dict[str, float]:
        """How the critic judges fresh responses that it was never fitted to: how far it drifted since it was last calibrated."""
        if self.critic is None or not labelled:
            return {}
        with self.clock.time("e_step"):
            terminal_S = self.terminal_values(labelled).cpu()
        found = {AUROC: auroc(terminal_S.numpy(), reward_S.numpy())}
        if with_brier:
            low, high = self.recipe.critic.target_range
            found[BRIER] = brier(((terminal_S - low) / (high - low)).clamp(0, 1).numpy(), reward_S.numpy())
        return found

    def e_step(self, sampled: Sampled, key: str) -> dict[str, float]:
        """Recalibrate: fit the critic to the verified outcomes of fresh responses from the current policy. Metrics say how much
        of its judgement of unlabelled responses it kept."""
        labelled, unlabelled = sampled.labelled, sampled.unlabelled
        if self.critic is None or self.critic_optimizer is None or not labelled:
            return {}
        looks = bool(unlabelled) and self.recipe.alarms.transfer_gap is not None
        with self.clock.time("e_step"):
            transfer = Transfer(self.terminal_values, labelled, unlabelled) if looks else None
            batch, seed = pack(labelled, self.policy.device), self.seed(key, "critic")
            return_S = self.label_outcome(torch.tensor(sampled.rewards)).to(self.policy.device)
            metrics = fit_critic(self.critic, self.critic_optimizer, batch, return_S, self.critic_update, seed=seed)
            metrics |= transfer.metrics() if transfer else {}
        return metrics | {
            "critic/skipped_steps": self.critic_optimizer.num_skipped,
            "tokens/trained_critic": self.critic_update.epochs * int(batch.cu_responses_S1[-1]),
        }

    def m_step(self, stage: Stage, scored: "Scored", sampled: Sampled, key: str) -> dict[str, float]:
        """Refine the policy along A_t = R - V(x, y_<t): R is the posterior's outcome, and on labelled rows the label."""
        unlabelled, labelled = sampled.unlabelled, sampled.labelled if stage.trains_on_labelled else []
        batch, old_logprob_T = scored.batch, scored.old_logprob_T
        if batch is None or old_logprob_T is None:
            return {}
        with self.clock.time("values"):
            value_TS = self.values(batch) if stage.reads_critic else None
        outcome_S = torch.cat([
            self.posterior(stage, sampled, value_TS, batch),
            self.label_outcome(torch.tensor(sampled.rewards)) if labelled else torch.empty(0),
        ]).to(self.policy.device)  # fmt: skip
        num_groups = len(unlabelled) // self.recipe.em.group_size
        group_S = torch.cat([
            torch.arange(len(unlabelled)) // self.recipe.em.group_size,
            torch.arange(len(labelled)) // self.recipe.em.labelled_group_size + num_groups,
        ]).to(self.policy.device)  # fmt: skip
        is_labelled_S = torch.arange(len(batch), device=self.policy.device) >= len(unlabelled)
        advantage_T, metrics = advantages(stage, outcome_S, value_TS, batch, group_S, is_labelled_S)
        with self.clock.time("m_step"):
            budget = self.recipe.micro_batch_tokens
            metrics |= improve_policy(
                self.policy,
                self.policy_optimizer,
                batch,
                advantage_T,
                scored.update,
                old_logprob_T=old_logprob_T,
                ref_logprob_T=self.reference.token_logprobs(batch, budget) if self.reference else None,
                seed=self.seed(key, "policy"),
            )
        return metrics | {
            "actor/skipped_steps": self.policy_optimizer.num_skipped,
            "tokens/trained_policy": self.policy_update.epochs * int(batch.cu_responses_S1[-1]),
        }

    def posterior(self, stage: Stage, sampled: Sampled, value_TS: Tensor | None, batch: PackedBatch) -> Tensor:
        """Outcome of each unlabelled response, [S]; these are the first rows of `batch`."""
        count = len(sampled.unlabelled)
        if stage.posterior not in ("critic", "frozen_critic") or not count:
            return self.to_target(torch.tensor(sampled.beliefs))
        assert self.critic is not None
        assert value_TS is not None, f"posterior {stage.posterior} without a critic"
        is_frozen = stage.posterior == "frozen_critic" and self.frozen_critic is not None
        judge, pessimism = self.frozen_critic if is_frozen else self.critic, self.recipe.critic.pessimism
        if judge is not None and (is_frozen or pessimism):  # else its values are known
            value_TS = judge.values(batch, self.recipe.micro_batch_tokens, pessimism=pessimism)
        terminal_S = self.critic.terminal_values(value_TS, batch)[:count]
        return (
            posteriors.critic(terminal_S, self.recipe.critic.target_range) if self.recipe.em.clamp else terminal_S
        ).cpu()

    def freeze_critic(self) -> None:
        """The EM loop begins: this is the critic that posterior frozen_critic keeps."""
        if self.frozen_critic is not None and self.critic is not None:
            self.frozen_critic.copy_from(self.critic)

    def values(self, batch: PackedBatch) -> Tensor:
        assert self.critic is not None
        return self.critic.values(batch, self.recipe.micro_batch_tokens)

    def terminal_values(self, rollouts: Sequence[Rollout]) -> Tensor:
        """What the critic makes of whole responses, [S]."""
        assert self.critic is not None
        batch = pack(rollouts, self.policy.device)
        return self.critic.terminal_values(self.values(batch), batch)

    def to_target(self, reward_S: Tensor) -> Tensor:
        """Rewards in {0, 1} on the scale the critic regresses on."""
        low, high = self.recipe.critic.target_range
        return low + (high - low) * reward_S

    def label_outcome(self, reward_S: Tensor) -> Tensor:
        """What verified responses are worth, in the E-step and in the M-step."""
        return self.to_target(posteriors.denoised(reward_S, self.recipe.em.noise_rate))

    def seed(self, *names: Any) -> int:
        """A seed of its own for every occasion, so nothing depends on what was drawn before."""
        text = "/".join(map(str, (self.recipe.loop_seed, *names)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def advantages(
    stage: Stage,
    outcome_S: Tensor,
    value_TS: Tensor | None,
    batch: PackedBatch,
    group_S: Tensor,
    is_labelled_S: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Outcome against baseline, then normalised, [T]; with their statistics from before the normalisation."""
    sequence_T = segment_ids(batch.cu_responses_S1)
    if stage.baseline == "critic_prefix":
        assert value_TS is not None, "baseline critic_prefix without a critic"
        advantage_T = advantage(outcome_S, value_TS, batch.cu_responses_S1)
    elif stage.normalise == "self_normalise":
        weight_S = posterior_weights(outcome_S, group_S) - float(stage.baseline == "group_mean")
        advantage_T = weight_S.nan_to_num(0.0).float()[sequence_T]
    elif stage.baseline == "group_mean":
        advantage_T = group_advantage(outcome_S, group_S, divide_by_std=stage.normalise == "group_std")[sequence_T]
    else:
        advantage_T = outcome_S.float()[sequence_T]
    metrics = {
        "critic/rewards/mean": float(outcome_S.mean()),
        "critic/advantages/mean": float(advantage_T.mean()),
        "critic/advantages/std": float(advantage_T.std()) if len(advantage_T) > 1 else 0.0,
    }
    if not is_labelled_S.all():
        metrics["critic/rewards/unlabelled"] = float(outcome_S[~is_labelled_S].mean())
    if stage.normalise in ("whiten", "whiten_per_population", "scale_per_population"):
        population_T = is_labelled_S[sequence_T].long() * (stage.normalise != "whiten")
        advantage_T = whiten(advantage_T, population_T, center=stage.normalise != "scale_per_population")
    return advantage_T, metrics


def posterior_weights(outcome_S: Tensor, group_S: Tensor) -> Tensor:
    """G w_i, the weights w_i = R_i / sum_j R_j of an exact E-step over the G responses of each group, [S] float64; NaN in groups
    without any outcome.

    They restore the factor 1 / P(correct | x) of the posterior q(y | x) = pi(y | x) R / P(correct | x) (arXiv 2604.19295, eq. 5).
    """
    num_groups = int(group_S.max()) + 1 if len(group_S) else 0
    mean_G = moments(outcome_S.double(), group_S, num_groups).mean_P
    return outcome_S.double() / mean_G.masked_fill(mean_G <= 0, torch.nan)[group_S]


def rollout_metrics(labelled: Sequence[Rollout], unlabelled: Sequence[Rollout], version: int) -> dict[str, float]:
    """What the updates get to see: lengths, truncation, the share of labelled rows, how many updates old the weights are."""
    rollouts = [*labelled, *unlabelled]
    if not rollouts:  # every labelled group was filtered, and there are no others
        return {}
    lengths = [len(r.response_ids) for r in rollouts]
    return {
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(max(lengths)),
        "response_length/clip_ratio": float(np.mean([r.is_truncated for r in rollouts])),
        "rollout/labelled_share": len(labelled) / len(rollouts),
        "rollout/version": float(min(r.oldest_version for r in rollouts)),
        "rollout/staleness_max": float(version - min(r.oldest_version for r in rollouts)),
        "rollout/mixed_versions": float(np.mean([len(r.versions) > 1 for r in rollouts])),
    }
