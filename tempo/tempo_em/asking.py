"""What an iteration asks the sampler for: responses to its next prompts, with groups that teach nothing replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tempo_engine import parallel
from tempo_engine.cursor import Cursor
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.tasks.answers import score

from tempo_em.waiting import Sampled

if TYPE_CHECKING:
    from tempo_em.schedule import EMLoop, Stage

# Refilling after groups without signal stops here: a set without any must not hang the run.
MAX_REFILLS = 10


class Asking:
    """One occasion. `num_responses` and `num_tokens` count everything sampled, kept or not; `cursors` move on."""

    def __init__(self, loop: EMLoop, stage: Stage, key: str, cursors: dict[str, Cursor[Any]]) -> None:
        self.loop, self.key, self.cursors = loop, key, cursors
        self.num_labelled, self.num_unlabelled = loop.recipe.groups(stage.labelled_share)
        self.num_responses, self.num_tokens = 0, 0

    def labelled(self) -> tuple[list[Rollout], list[float], float | None]:
        """Fresh responses to labelled prompts, their verified rewards in {0, 1}, and the accuracy of all that were sampled.

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
            fresh_rewards = self._verify(fresh, [item.answers for item in items for _ in range(size)])
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

    def unlabelled(self) -> list[Rollout]:
        """Fresh responses to unlabelled prompts. With dynamic sampling, groups that all give one answer are replaced."""
        size, extract = self.loop.recipe.em.group_size, self.loop.extract_unlabelled
        wanted = self.num_unlabelled * size
        rollouts: list[Rollout] = []
        for refill in range(MAX_REFILLS if wanted else 0):
            # The first occasion's name has no number: nothing else changes when dynamic sampling is off.
            fresh = self._ask(
                self.cursors["unlabelled"].next(self.num_unlabelled),
                size,
                f"unlabelled/{refill}" if refill else "unlabelled",
            )
            for start in range(0, len(fresh), size):
                group = fresh[start : start + size]
                if not self.loop.recipe.em.dynamic_sampling or len({extract(r.text) for r in group}) > 1:
                    rollouts += group
            if len(rollouts) >= wanted:
                break
        return rollouts[:wanted]

    def _ask(self, prompts: list[Prompt], group_size: int, what: str) -> list[Rollout]:
        rollouts = self.loop.sampler.sample(prompts, group_size, key=f"{self.key}/{what}")
        self.num_responses += len(rollouts)
        self.num_tokens += sum(len(r.response_ids) for r in rollouts)
        return rollouts

    def _verify(self, rollouts: list[Rollout], answers: list[frozenset[str]]) -> list[float]:
        """1.0 for each right response, 0.0 for each wrong one."""
        return parallel.together(
            [len(r.response_ids) for r in rollouts],
            lambda mine: [score(self.loop.extract_labelled, rollouts[i].text, answers[i]) for i in mine],
        )


def without_stale_groups(sampled: Sampled, oldest: int, labelled_size: int, unlabelled_size: int) -> Sampled:
    """Without the groups any of whose tokens are of a version before `oldest`. Groups go whole: baselines are means over them."""

    def kept(rollouts: list[Rollout], size: int) -> list[int]:
        groups = [range(start, start + size) for start in range(0, len(rollouts), size)]
        return [i for group in groups if all(rollouts[i].oldest_version >= oldest for i in group) for i in group]

    labelled, unlabelled = kept(sampled.labelled, labelled_size), kept(sampled.unlabelled, unlabelled_size)
    return replace(
        sampled,
        labelled=[sampled.labelled[i] for i in labelled],
        rewards=[sampled.rewards[i] for i in labelled],
        unlabelled=[sampled.unlabelled[i] for i in unlabelled],
    )
