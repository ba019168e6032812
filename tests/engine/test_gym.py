"""Items of reasoning-gym, here of a stand-in with the same interface."""

import random
import sys

import pytest
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.gym import SPACING, TASKS, Gym
from tempo_engine.tasks.question import draw_questions

pytestmark = pytest.mark.usefixtures("fake_gym")
# Those whose scorers evaluate answers, or give marks for anything.
UNSAFE = (
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion", "game_of_life_halting", "coin_flip", "codeio",
)  # fmt: skip


def test_an_item_becomes_a_question_that_says_how_to_answer() -> None:
    question = Gym("chain_sum", {"largest": 0}).draw(0, random.Random(0))
    assert question.content == 'Add 0 and 0. End with "Answer: the answer".'
    assert question.answers == {"0"}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("so it is\nAnswer: 0", 1),
        ("Answer: 00", 1),
        ("Answer: 10", 0),
        ("Answer: The answer is 0", 0),
        ("0", 0),
        ("", 0),
    ],
)
def test_only_the_whole_answer_counts(response: str, reward: float) -> None:
    generator = Gym("chain_sum", {"largest": 0})
    assert score(generator.extract, response, generator.draw(0, random.Random(0)).answers) == reward


def test_seeds_lie_so_far_apart_that_no_items_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    create = sys.modules["reasoning_gym"].create_dataset
    monkeypatch.setattr(
        sys.modules["reasoning_gym"],
        "create_dataset",
        lambda name, **how: (seeds.append(how["seed"]), create(name, **how))[1],
    )
    draw_questions(Gym("chain_sum"), "labelled", 20, seed=0, where="data")
    assert len(seeds) >= 20
    assert all(seed % SPACING == 0 for seed in seeds)


def test_a_set_holds_no_item_twice() -> None:
    questions = draw_questions(Gym("chain_sum", {"largest": 5}), "labelled", 10, seed=0, where="data")
    assert len({question.content for question in questions}) == 10


def test_the_worked_response_is_the_bare_answer() -> None:
    generator, rng = Gym("chain_sum", {"largest": 0}), random.Random(0)
    assert generator.trace(generator.draw(0, rng), "right", rng) == "Answer: 0"


@pytest.mark.parametrize("task", [*UNSAFE, "no_such_task"])
def test_other_tasks_are_refused_with_the_list(task: str) -> None:
    assert task not in TASKS
    with pytest.raises(
        UserError, match=rf"the gym task '{task}' is not among .*: aiw, basic_arithmetic, .*zebra_puzzles"
    ):
        Gym(task).draw(0, random.Random(0))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"largest": 0.5, "colour": 3}, "colour"), ({"largest": -1}, "largest must be >= 0"), ({"seed": 3}, "seed")],
)
def test_settings_that_a_task_refuses_are_answered_with_its_reason(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(UserError, match=f"reasoning-gym's chain_sum refuses its settings: .*{reason}"):
        Gym("chain_sum", settings).draw(0, random.Random(0))


def test_a_missing_package_is_answered_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'tempo-engine\[gym\]'"):
        Gym("chain_sum").draw(0, random.Random(0))
