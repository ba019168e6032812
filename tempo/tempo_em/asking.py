"""What an iteration asks the sampler for: responses to its next prompts, with groups that teach nothing replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tempo_engine.cursor import Cursor
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.verify import verify

from tempo_em import posteriors
from tempo_em.waiting import Sampled

if TYPE_CHECKING:
    from tempo_em.schedule import EMLoop, Stage

# Refilling after groups without signal stops here: a set without any must not hang the run.
MAX_REFILLS = 10


class Asking:
    """One occasion. `num_responses` and `num_tokens` count everything sampled, kept or not; `cursors` move on. `beliefs` are the
    outcomes of the unlabelled responses, see `Sampled`."""

    def __init__(self, loop: EMLoop, stage: Stage, key: str, cursors: dict[str, Cursor[Any]]) -> None:
        self.loop, self.stage, self.key, self.cursors = loop, stage, key, cursors
        self.beliefs: list[float] = []
        self.num_labelled, self.num_unlabelled = loop.recipe.groups(stage.labelled_share)
        self.num_responses, self.num_tokens = 0, 0

    def labelled(self) -> tuple[list[Rollout], list[float], float | None]:
        """Fresh responses to labelled prompts, their verified rewards in [0, 1], and the accuracy of all that were sampled.

        With the filter, groups without signal are left out and replaced; the accuracy counts them, or its fall would not show.
        """
        size = self.loop.recipe.em.labelled_group_size
        wanted = self.num_labelled * size
        rollouts: list[Rollout] = []
        rewards: list[float] = []
        all_rewards: list[float] = []
        for refill in range(MAX_REFILLS if wanted else 0):
            items = self.cursors["labelled"].next(self.num_labelled)
            fresh = self._ask([item.prompt for item in items], size, f"labelled/{refill}")
            asked = [item for item in items for _ in range(size)]
            fresh_rewards = self._with_noise(fresh, verify(self.loop.verifier, fresh, asked))
            all_rewards += fresh_rewards
            for start in range(0, len(fresh), size):
                group = slice(start, start + size)
                if self.loop.recipe.estep.filter == "none" or len(set(fresh_rewards[group])) > 1:
                    rollouts += fresh[group]
                    rewards += fresh_rewards[group]
            if len(rollouts) >= wanted:
                break
        accuracy = sum(all_rewards) / len(all_rewards) if all_rewards else None
        return rollouts[:wanted], rewards[:wanted], accuracy

    def _with_noise(self, rollouts: list[Rollout], rewards: list[float]) -> list[float]:
        noise, seed = self.loop.recipe.data.label_noise, self.loop.recipe.seed
        if not noise:
            return rewards
        pairs = zip(rollouts, rewards, strict=True)
        return [1.0 - r if posteriors.is_mislabelled(rollout.prompt.id, noise, seed) else r for rollout, r in pairs]

    def unlabelled(self) -> list[Rollout]:
        """Fresh responses to unlabelled prompts, without those that only voted. Groups outside the entropy band are left out; with
        dynamic sampling they are replaced, and so are groups that all give one answer."""
        em = self.loop.recipe.em
        wanted = self.num_unlabelled * em.group_size
        rollouts: list[Rollout] = []
        for refill in range(MAX_REFILLS if wanted else 0):
            # The first occasion's name has no number: nothing else changes when dynamic sampling is off.
            fresh = self._ask(
                self.cursors["unlabelled"].next(self.num_unlabelled),
                em.samples,
                f"unlabelled/{refill}" if refill else "unlabelled",
            )
            for start in range(0, len(fresh), em.samples):
                group = fresh[start : start + em.samples]
                answers = [self.loop.extract_unlabelled(r.text) for r in group]
                if self._teaches(answers):
                    rollouts += group[: em.group_size]
                    self.beliefs += self._beliefs(group, answers)[: em.group_size]
            if len(rollouts) >= wanted or not em.dynamic_sampling:
                break
        if self.stage.posterior == "random":
            self.beliefs = posteriors.coin_flip(len(rollouts), f"{self.loop.recipe.loop_seed}/{self.key}").tolist()
        self.beliefs = self.beliefs[:wanted]
        return rollouts[:wanted]

    def _teaches(self, answers: list[str | None]) -> bool:
        em = self.loop.recipe.em
        if em.dynamic_sampling and len(set(answers)) == 1:
            return False
        return em.entropy_band is None or em.entropy_band[0] < posteriors.answer_entropy(answers) < em.entropy_band[1]

    def _beliefs(self, group: list[Rollout], answers: list[str | None]) -> list[float]:
        """What a group's answers say of each response; nothing when the posterior does not read answers."""
        posterior = self.stage.posterior
        if posterior == "majority_vote":
            return posteriors.majority_vote([answers]).tolist()
        if posterior == "cluster_frequency":
            return posteriors.cluster_frequency([answers]).tolist()
        if posterior == "oracle":
            assert self.loop.oracle is not None, "posterior oracle without answers"
            items = [self.loop.oracle.items[rollout.prompt.id] for rollout in group]
            return verify(self.loop.oracle.verifier, group, items)
        return []

    def _ask(self, prompts: list[Prompt], group_size: int, what: str) -> list[Rollout]:
        rollouts = self.loop.sampler.sample(prompts, group_size, key=f"{self.key}/{what}")
        self.num_responses += len(rollouts)
        self.num_tokens += sum(len(r.response_ids) for r in rollouts)
        return rollouts


def without_stale_groups(sampled: Sampled, oldest: int, labelled_size: int, unlabelled_size: int) -> Sampled:
    """Without the groups any of whose tokens are of a version before `oldest`. Groups go whole: baselines are means over them."""

    def kept(rollouts: list[Rollout], size: int) -> list[int]:
        groups = [range(start, start + size) for start in range(0, len(rollouts), size)]
        return [i for group in groups if all(rollouts[i].oldest_version >= oldest for i in group) for i in group]

    labelled, unlabelled = kept(sampled.labelled, labelled_size), kept(sampled.unlabelled, unlabelled_size)
    return replace(
        sampled,
        beliefs=[sampled.beliefs[i] for i in unlabelled] if sampled.beliefs else [],
        labelled=[sampled.labelled[i] for i in labelled],
        rewards=[sampled.rewards[i] for i in labelled],
        unlabelled=[sampled.unlabelled[i] for i in unlabelled],
    )
