"""The EM loop. One iteration reads as the paper's Algorithm 1 (arXiv 2604.19295); every method is a setting of its switches."""

# Shape letters: T = packed response tokens, S = sequences
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tempo_engine import parallel
from tempo_engine.cursor import Cursor
from tempo_engine.metrics import auroc
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import PackedBatch, pack
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.samplers import Sampler
from tempo_engine.tasks.answers import Extract, score
from tempo_engine.tracking import Clock
from tempo_engine.updates import CriticUpdate, PolicyUpdate, fit_critic, improve_policy
from tempo_kernels import advantage, group_advantage, split_values, whiten
from tempo_kernels.segments import segment_ids
from torch import Tensor

from tempo_em import posteriors
from tempo_em.recipe import Recipe
from tempo_em.waiting import Sampled, Waiting

# Refilling after filtered groups stops here: a labelled set without signal must not hang the run.
MAX_REFILLS = 10


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

    @property
    def reads_critic(self) -> bool:
        """Whether the M-step needs values: as outcome, or as baseline."""
        return self.posterior == "critic" or self.baseline == "critic_prefix"


@dataclass
class EMLoop:
    """The parts an iteration works with. `unlabelled` yields Prompts: there is no label in reach of the M-step to leak."""

    recipe: Recipe
    policy: Policy
    critic: Critic | None
    reference: Policy | None
    sampler: Sampler
    labelled: Cursor[Labelled]
    unlabelled: Cursor[Prompt]
    extract_labelled: Extract
    extract_unlabelled: Extract
    policy_optimizer: Optimizer
    critic_optimizer: Optimizer | None
    policy_update: PolicyUpdate
    critic_update: CriticUpdate
    clock: Clock
    waiting: Waiting | None = None

    def iterate(self, stage: Stage, iteration: int) -> dict[str, float]:
        """One EM iteration: sample, recalibrate the critic (E), refine the policy (M), hand the new weights to the sampler."""
        key = f"{stage.name}/{iteration}"
        recalibrates = stage.recalibrates_every > 0 and iteration % stage.recalibrates_every == 0
        with self.clock.time("rollout"):
            sampled = self.sample(stage, key)
        labelled, unlabelled, reward_S = sampled.labelled, sampled.unlabelled, torch.tensor(sampled.rewards)
        metrics = rollout_metrics(labelled, unlabelled)
        metrics |= {} if sampled.accuracy is None else {"critic/score/mean": sampled.accuracy}
        metrics |= {"rollout/responses": sampled.num_responses, "tokens/generated": sampled.num_tokens}
        if recalibrates and self.recipe.em.order == "e_then_m":
            metrics |= self.e_step(labelled, reward_S, key)
        if stage.improves_policy:
            metrics |= self.m_step(stage, labelled, reward_S, unlabelled, key)
            self.sampler.load(self.policy)
        if recalibrates and self.recipe.em.order == "lagged":
            metrics |= self.e_step(labelled, reward_S, key)
        return metrics

    def sample(self, stage: Stage, key: str) -> Sampled:
        """Fresh rollouts from the current policy; or those that a killed run had sampled from it for this very occasion."""
        sampled = self.waiting and self.waiting.take(key, self.policy.version)
        if sampled:
            self.labelled.position, self.unlabelled.position = (
                sampled.cursors["labelled"],
                sampled.cursors["unlabelled"],
            )
            return sampled

        def fresh() -> Sampled:
            before = self.sampler.num_responses, self.sampler.num_tokens
            labelled, rewards, accuracy = self.sample_labelled(stage, key)
            unlabelled = self.sample_unlabelled(stage, key)
            counts = self.sampler.num_responses - before[0], self.sampler.num_tokens - before[1]
            cursors = {"labelled": self.labelled.position, "unlabelled": self.unlabelled.position}
            return Sampled(labelled, rewards, accuracy, unlabelled, *counts, cursors)

        return self.waiting.keep(key, self.policy.version, fresh) if self.waiting else fresh()

    def sample_labelled(self, stage: Stage, key: str) -> tuple[list[Rollout], list[float], float | None]:
        """Fresh responses to labelled prompts, their verified rewards in {0, 1}, and the accuracy of all that were sampled.

        With the filter, groups without signal are left out and replaced; the accuracy counts them, or its fall would not show.
        """
        num_groups, group_size = self.recipe.groups(stage.labelled_share)[0], self.recipe.em.labelled_group_size
        rollouts: list[Rollout] = []
        rewards: list[float] = []
        all_rewards: list[float] = []
        for refill in range(MAX_REFILLS if num_groups else 0):
            items = self.labelled.next(num_groups)
            fresh = self.sampler.sample([item.prompt for item in items], group_size, key=f"{key}/labelled/{refill}")
            fresh_rewards = self.verify(fresh, [item.answers for item in items for _ in range(group_size)])
            for start in range(0, len(fresh), group_size):
                group = slice(start, start + group_size)
                all_rewards += fresh_rewards[group]
                if self.recipe.estep.filter == "none" or len(set(fresh_rewards[group])) > 1:
                    rollouts += fresh[group]
                    rewards += fresh_rewards[group]
            if len(rollouts) >= num_groups * group_size:
                break
        wanted = num_groups * group_size
        accuracy = sum(all_rewards) / len(all_rewards) if all_rewards else None
        return rollouts[:wanted], rewards[:wanted], accuracy

    def verify(self, rollouts: list[Rollout], answers: list[frozenset[str]]) -> list[float]:
        """1.0 for each right response, 0.0 for each wrong one."""
        return parallel.together(
            [len(r.response_ids) for r in rollouts],
            lambda mine: [score(self.extract_labelled, rollouts[i].text, answers[i]) for i in mine],
        )

    def sample_unlabelled(self, stage: Stage, key: str) -> list[Rollout]:
        num_groups = self.recipe.groups(stage.labelled_share)[1]
        prompts = self.unlabelled.next(num_groups)
        return self.sampler.sample(prompts, self.recipe.em.group_size, key=f"{key}/unlabelled") if prompts else []

    def e_step(self, labelled: list[Rollout], reward_S: Tensor, key: str) -> dict[str, float]:
        """Recalibrate: fit the critic to the verified outcomes of fresh responses from the current policy."""
        if self.critic is None or self.critic_optimizer is None or not labelled:
            return {}
        with self.clock.time("e_step"):
            batch = pack(labelled, self.policy.device)
            # Read before the fit, on responses it has never seen: how far the critic drifted since it was last calibrated.
            _, terminal_S = split_values(self.values(batch), batch.cu_responses_S1)
            return_S, seed = self.to_target(reward_S).to(self.policy.device), self.seed(key, "critic")
            metrics = fit_critic(self.critic, self.critic_optimizer, batch, return_S, self.critic_update, seed=seed)
        return metrics | {
            "critic/auroc_fresh": auroc(terminal_S.cpu().numpy(), reward_S.numpy()),
            "critic/skipped_steps": self.critic_optimizer.num_skipped,
            "tokens/trained_critic": self.critic_update.epochs * int(batch.cu_responses_S1[-1]),
        }

    def m_step(
        self, stage: Stage, labelled: list[Rollout], reward_S: Tensor, unlabelled: list[Rollout], key: str
    ) -> dict[str, float]:
        """Refine the policy along A_t = R - V(x, y_<t): R is the posterior's outcome, and on labelled rows the label."""
        labelled = labelled if stage.trains_on_labelled else []
        if not labelled and not unlabelled:
            return {}
        with self.clock.time("values"):
            batch = pack([*unlabelled, *labelled], self.policy.device)
            value_TS = self.values(batch) if stage.reads_critic else None
        outcome_S = torch.cat([
            self.posterior(stage, unlabelled, value_TS, batch, key),
            self.to_target(reward_S) if labelled else torch.empty(0),
        ]).to(self.policy.device)  # fmt: skip
        num_groups = len(unlabelled) // self.recipe.em.group_size
        group_S = torch.cat([
            torch.arange(len(unlabelled)) // self.recipe.em.group_size,
            torch.arange(len(labelled)) // self.recipe.em.labelled_group_size + num_groups,
        ]).to(self.policy.device)  # fmt: skip
        is_labelled_S = torch.arange(len(batch), device=self.policy.device) >= len(unlabelled)
        advantage_T, metrics = advantages(stage, outcome_S, value_TS, batch, group_S, is_labelled_S)
        with self.clock.time("m_step"):
            old_logprob_T, budget = batch.sampler_logprob_T, self.recipe.micro_batch_tokens
            if self.recipe.mstep.old_logprob == "trainer":
                old_logprob_T = self.policy.token_logprobs(batch, budget)
                metrics["rollout/logprob_diff_max"] = float((old_logprob_T - batch.sampler_logprob_T).abs().max())
            metrics |= improve_policy(
                self.policy,
                self.policy_optimizer,
                batch,
                advantage_T,
                self.policy_update,
                old_logprob_T=old_logprob_T,
                ref_logprob_T=self.reference.token_logprobs(batch, budget) if self.reference else None,
                seed=self.seed(key, "policy"),
            )
        return metrics | {
            "actor/skipped_steps": self.policy_optimizer.num_skipped,
            "tokens/trained_policy": self.policy_update.epochs * int(batch.cu_responses_S1[-1]),
        }

    def posterior(
        self, stage: Stage, unlabelled: list[Rollout], value_TS: Tensor | None, batch: PackedBatch, key: str
    ) -> Tensor:
        """Outcome of each unlabelled response, [S]; these are the first rows of `batch`."""
        if not unlabelled:
            return torch.empty(0)
        if stage.posterior == "critic":
            assert value_TS is not None, "posterior critic without a critic"
            baseline_T, terminal_S = split_values(value_TS, batch.cu_responses_S1)
            if self.recipe.em.terminal == "last_prefix":
                terminal_S = baseline_T[batch.cu_responses_S1[1:] - 1]
            return posteriors.critic(terminal_S[: len(unlabelled)], self.recipe.critic.target_range).cpu()
        if stage.posterior == "random":
            return self.to_target(posteriors.coin_flip(len(unlabelled), f"{self.recipe.seed}/{key}"))
        size = self.recipe.em.group_size
        texts = [self.extract_unlabelled(r.text) for r in unlabelled]
        answers = [texts[i : i + size] for i in range(0, len(texts), size)]
        belief = posteriors.majority_vote if stage.posterior == "majority_vote" else posteriors.cluster_frequency
        return self.to_target(belief(answers))

    def values(self, batch: PackedBatch) -> Tensor:
        assert self.critic is not None
        return self.critic.values(batch, self.recipe.micro_batch_tokens)

    def to_target(self, reward_S: Tensor) -> Tensor:
        """Rewards in {0, 1} on the scale the critic regresses on."""
        low, high = self.recipe.critic.target_range
        return low + (high - low) * reward_S

    def seed(self, *names: Any) -> int:
        """A seed of its own for every occasion, so nothing depends on what was drawn before."""
        text = "/".join(map(str, (self.recipe.seed, *names)))
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
    elif stage.baseline == "group_mean":
        advantage_T = group_advantage(outcome_S, group_S, divide_by_std=stage.normalise == "group_std")[sequence_T]
    else:
        advantage_T = outcome_S.float()[sequence_T]
    metrics = {
        "critic/rewards/mean": float(outcome_S.mean()),
        "critic/advantages/mean": float(advantage_T.mean()),
        "critic/advantages/std": float(advantage_T.std()) if len(advantage_T) > 1 else 0.0,
    }
    if stage.normalise in ("whiten", "whiten_per_population", "scale_per_population"):
        population_T = is_labelled_S[sequence_T].long() * (stage.normalise != "whiten")
        advantage_T = whiten(advantage_T, population_T, center=stage.normalise != "scale_per_population")
    return advantage_T, metrics


def rollout_metrics(labelled: Sequence[Rollout], unlabelled: Sequence[Rollout]) -> dict[str, float]:
    """What the updates get to see: lengths, truncation, the share of labelled rows."""
    rollouts = [*labelled, *unlabelled]
    if not rollouts:  # every labelled group was filtered, and there are no others
        return {}
    lengths = [len(r.response_ids) for r in rollouts]
    return {
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(max(lengths)),
        "response_length/clip_ratio": float(np.mean([r.is_truncated for r in rollouts])),
        "rollout/labelled_share": len(labelled) / len(rollouts),
        "rollout/version": float(rollouts[0].version),
    }
