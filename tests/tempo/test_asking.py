"""What an iteration asks the sampler for, with a sampler whose every response is known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tempo_em.asking import MAX_REFILLS, Asking, without_stale_groups
from tempo_em.build import stages_of
from tempo_em.loading import load_recipe
from tempo_em.posteriors import is_mislabelled
from tempo_em.schedule import EMLoop
from tempo_em.waiting import Sampled
from tempo_engine.cursor import Cursor
from tempo_engine.model import Policy
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.tasks.answers import whole
from tempo_engine.verify import ExactMatch

# 4 labelled groups of 2 and 2 unlabelled groups of 4 an iteration.
SMALL = ("em.rollouts=16", "em.group_size=4", "em.labelled_group_size=2")
PROMPTS = [Prompt(f"q{i}", "", (5, 6)) for i in range(8)]
Say = Callable[[str, int, int], str]


class Scripted:
    """A sampler that says what it is told: say(occasion, number of the prompt in it, number of the sample)."""

    num_responses = num_tokens = 0

    def __init__(self, say: Say) -> None:
        self.say = say
        self.asked: list[tuple[str, list[str], int]] = []

    def open(self, folder: Path, policy: Policy) -> None:
        pass

    def close(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def load(self, policy: Policy) -> None:
        pass

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, *, key: str, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        self.asked.append((key, [prompt.id for prompt in prompts], group_size))
        return [
            Rollout(prompt, [2, 3, 1], [-1.0] * 3, ((0, 3),), False, self.say(key, number, sample))
            for number, prompt in enumerate(prompts)
            for sample in range(group_size)
        ]


def asking(say: Say, *settings: str, share: float | None = None) -> tuple[Asking, Scripted]:
    recipe = load_recipe("tiny", [*SMALL, *settings]).recipe
    sampler = Scripted(say)
    loop = SimpleNamespace(recipe=recipe, sampler=sampler, verifier=ExactMatch(whole), extract_unlabelled=whole)
    em = stages_of(recipe)[-1]
    stage = em if share is None else replace(em, labelled_share=share)
    labelled = Cursor([Labelled(prompt, frozenset({"right"})) for prompt in PROMPTS], seed="labelled")
    cursors: dict[str, Cursor[Any]] = {"labelled": labelled, "unlabelled": Cursor(PROMPTS, seed="unlabelled")}
    return Asking(cast(EMLoop, loop), stage, "em/3", cursors), sampler


def right_at(*samples: int) -> Say:
    return lambda key, number, sample: "right" if sample in samples else "wrong"


def same_answer(key: str, number: int, sample: int) -> str:
    return "7"


def different_answers(key: str, number: int, sample: int) -> str:
    return str(sample)


def cluster_of_two(key: str, number: int, sample: int) -> str:
    """The first prompt's answers all differ; those of the second are 0 0 1 2 3 4 5 6."""
    return str(sample) if number == 0 else str(max(sample - 1, 0))


# --- Labels that lie ---------------------------------------------------------------------------------------------------------


def test_mislabelled_questions_have_every_verdict_turned_round() -> None:
    """The first sample of each prompt is right. Where the question is mislabelled it is the second one that passes for right."""
    asks, _ = asking(right_at(0), "data.label_noise=0.4")
    rollouts, rewards, accuracy = asks.labelled()
    lies = [is_mislabelled(r.prompt.id, 0.4, 0) for r in rollouts]
    assert any(lies)
    assert not all(lies)
    assert rewards == [float((i % 2 == 0) != lie) for i, lie in enumerate(lies)]
    assert accuracy == 0.5


# --- Unlabelled --------------------------------------------------------------------------------------------------------------


def test_responses_are_asked_for_once_and_all_kept() -> None:
    asks, sampler = asking(same_answer)
    rollouts = asks.unlabelled()
    ids = [prompt.id for prompt in Cursor(PROMPTS, seed="unlabelled").next(2)]
    assert sampler.asked == [("em/3/unlabelled", ids, 4)]
    assert [r.prompt.id for r in rollouts] == [i for i in ids for _ in range(4)]
    assert (asks.num_responses, asks.num_tokens, asks.cursors["unlabelled"].position) == (8, 24, 2)


def test_more_responses_vote_than_are_trained_on() -> None:
    """Of eight responses to each prompt four are kept, with outcomes that all eight decided."""
    asks, sampler = asking(cluster_of_two, "method=empo", "em.labelled_share=0.5", "em.votes=8", "em.rollouts=32")
    rollouts = asks.unlabelled()
    assert [size for _, _, size in sampler.asked] == [8]
    assert [r.text for r in rollouts] == ["0", "1", "2", "3", "0", "0", "1", "2"]
    assert asks.beliefs == [1 / 8] * 4 + [2 / 8] * 2 + [1 / 8] * 2
    assert asks.num_responses == 16, "voters were sampled too"


def test_groups_outside_the_entropy_band_are_left_out() -> None:
    asks, sampler = asking(cluster_of_two, "em.entropy_band=[0, 1]", "em.posterior=cluster_frequency")
    rollouts = asks.unlabelled()
    assert [r.text for r in rollouts] == ["0", "0", "1", "2"]
    assert asks.beliefs == [0.5, 0.5, 0.25, 0.25]
    assert len(sampler.asked) == 1, "and not replaced without dynamic sampling"


def test_a_set_whose_groups_all_agree_ends_dynamic_sampling_after_ten_times() -> None:
    asks, sampler = asking(same_answer, "em.dynamic_sampling=true")
    assert MAX_REFILLS == 10
    assert asks.unlabelled() == []
    keys = ["em/3/unlabelled", *(f"em/3/unlabelled/{refill}" for refill in range(1, 10))]
    assert [key for key, _, _ in sampler.asked] == keys, "each occasion has draws of its own"
    assert (asks.num_responses, asks.num_tokens, asks.cursors["unlabelled"].position) == (80, 240, 20)


def test_dynamic_sampling_replaces_groups_that_agree_by_later_ones() -> None:
    """The first prompt of each occasion is agreed on: of two groups one is kept, so it takes two occasions."""
    asks, sampler = asking(lambda key, number, sample: "7" if number == 0 else str(sample), "em.dynamic_sampling=true")
    rollouts = asks.unlabelled()
    kept = [ids[1] for _, ids, _ in sampler.asked]
    assert len(sampler.asked) == 2
    assert [r.prompt.id for r in rollouts] == [i for i in kept for _ in range(4)]
    assert (asks.num_responses, asks.num_tokens, asks.cursors["unlabelled"].position) == (16, 48, 4)


def test_dynamic_sampling_never_returns_more_than_was_wanted() -> None:
    """One group of the first occasion and both of the second differ: the last of these three is too many."""

    def say(key: str, number: int, sample: int) -> str:
        return "7" if (key, number) == ("em/3/unlabelled", 0) else str(sample)

    asks, sampler = asking(say, "em.dynamic_sampling=true")
    rollouts = asks.unlabelled()
    kept = [sampler.asked[0][1][1], sampler.asked[1][1][0]]
    assert [r.prompt.id for r in rollouts] == [i for i in kept for _ in range(4)]
    assert asks.num_responses == 16, "what was sampled counts, kept or not"


def test_groups_that_differ_are_asked_for_once() -> None:
    asks, sampler = asking(different_answers, "em.dynamic_sampling=true")
    assert len(asks.unlabelled()) == 8
    assert len(sampler.asked) == 1


def test_one_different_answer_is_enough_to_keep_a_group() -> None:
    asks, _ = asking(lambda key, number, sample: "8" if sample == 3 else "7", "em.dynamic_sampling=true")
    assert [r.text for r in asks.unlabelled()] == ["7", "7", "7", "8"] * 2


# --- Labelled ----------------------------------------------------------------------------------------------------------------


def test_labelled_responses_come_with_their_rewards_and_their_accuracy() -> None:
    asks, sampler = asking(right_at(1))
    rollouts, rewards, accuracy = asks.labelled()
    assert [(key, size) for key, _, size in sampler.asked] == [("em/3/labelled/0", 2)]
    assert [r.text for r in rollouts] == ["wrong", "right"] * 4
    assert rewards == [0.0, 1.0] * 4
    assert accuracy == 0.5


def test_filtered_groups_are_replaced_and_counted_in_the_accuracy() -> None:
    """Prompts 0 and 1 of the first occasion are always right, so 12 of the 16 responses of both are."""

    def say(key: str, number: int, sample: int) -> str:
        return "right" if sample == 0 or (key.endswith("/0") and number < 2) else "wrong"

    asks, sampler = asking(say, "estep.filter=zero_variance")
    rollouts, rewards, accuracy = asks.labelled()
    kept = [*sampler.asked[0][1][2:], *sampler.asked[1][1][:2]]
    assert [r.prompt.id for r in rollouts] == [i for i in kept for _ in range(2)]
    assert rewards == [1.0, 0.0] * 4
    assert accuracy == (2 * 2 + 2 * 1 + 4 * 1) / 16
    assert (asks.num_responses, asks.num_tokens, asks.cursors["labelled"].position) == (16, 48, 8)


@pytest.mark.parametrize(("samples", "found"), [((), 0.0), ((0, 1), 1.0)])
def test_a_labelled_set_without_signal_ends_the_refilling_after_ten_times(
    samples: tuple[int, ...], found: float
) -> None:
    asks, sampler = asking(right_at(*samples), "estep.filter=zero_variance")
    assert asks.labelled() == ([], [], found)
    assert [key for key, _, _ in sampler.asked] == [f"em/3/labelled/{refill}" for refill in range(10)]
    assert asks.num_responses == 80


def test_both_populations_count_together() -> None:
    asks, _ = asking(right_at(0))
    asks.labelled()
    asks.unlabelled()
    assert (asks.num_responses, asks.num_tokens) == (16, 48)
    assert {name: cursor.position for name, cursor in asks.cursors.items()} == {"labelled": 4, "unlabelled": 2}


def test_a_share_of_none_asks_nothing() -> None:
    none, everything = asking(right_at(0), share=0.0), asking(right_at(0), share=1.0)
    assert none[0].labelled() == ([], [], None)
    assert everything[0].unlabelled() == []
    assert none[1].asked == everything[1].asked == []


# --- Staleness ---------------------------------------------------------------------------------------------------------------


def sampled_by(labelled: list[tuple[int, ...]], unlabelled: list[tuple[int, ...]]) -> Sampled:
    """Responses of one token a version; the n-th labelled one has reward n / 8."""

    def responses(versions: list[tuple[int, ...]]) -> list[Rollout]:
        return [
            Rollout(
                PROMPTS[n], [2] * len(v), [-1.0] * len(v), tuple((x, i + 1) for i, x in enumerate(v)), False, str(n)
            )
            for n, v in enumerate(versions)
        ]

    rewards = [n / 8 for n in range(len(labelled))]
    return Sampled(responses(labelled), rewards, 0.75, responses(unlabelled), 99, 999, {"labelled": 4, "unlabelled": 2})


def kept(sampled: Sampled) -> tuple[list[str], list[float], list[str]]:
    return [r.text for r in sampled.labelled], sampled.rewards, [r.text for r in sampled.unlabelled]


def test_groups_with_a_stale_token_go_whole() -> None:
    """From version 5 on: a response that began with 4 takes its group with it, whatever the others are."""
    sampled = sampled_by([(5,), (6,), (6,), (4, 5, 6)], [(4,), (6,), (6,), (5, 6), (5,), (5,)])
    fresh = without_stale_groups(sampled, 5, 2, 3)
    assert kept(fresh) == (["0", "1"], [0.0, 1 / 8], ["3", "4", "5"])
    assert (fresh.accuracy, fresh.num_responses, fresh.num_tokens, fresh.cursors) == (
        0.75,
        99,
        999,
        {"labelled": 4, "unlabelled": 2},
    ), "it was sampled all the same"


def test_rewards_stay_with_their_responses() -> None:
    sampled = sampled_by([(1,), (1,), (2,), (2,), (1,), (1,), (2,), (2,)], [])
    assert kept(without_stale_groups(sampled, 2, 2, 4)) == (["2", "3", "6", "7"], [2 / 8, 3 / 8, 6 / 8, 7 / 8], [])


def test_fresh_responses_all_stay() -> None:
    sampled = sampled_by([(5,), (5, 6)], [(6,), (7,)])
    assert without_stale_groups(sampled, 5, 2, 2) == sampled


def test_of_stale_responses_none_stays() -> None:
    assert kept(without_stale_groups(sampled_by([(1,), (1,)], [(1,), (1,)]), 2, 2, 2)) == ([], [], [])
