"""Questions of reasoning-gym (pip install 'tempo-engine[gym]'), read by our own exact match.

Its scorers are never called: several of them evaluate the answer as Python. Only tasks with one right answer that can be compared
as text are taken. Item i of seed s is drawn from s + i, so neighbouring seeds share items: seeds here are a million apart.
"""

import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tempo_engine.errors import UserError, first_sentence
from tempo_engine.tasks.answers import MAX_ANSWER_CHARS
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, folded

TASKS = (
    "aiw", "basic_arithmetic", "calendar_arithmetic", "chain_sum", "circuit_logic", "count_bits", "course_schedule",
    "family_relationships", "fraction_simplification", "gcd", "gsm_symbolic", "knights_knaves", "largest_island", "lcm",
    "leg_counting", "letter_counting", "number_sequence", "number_sorting", "products", "self_reference", "simple_equations",
    "syllogism", "time_intervals", "word_sorting", "zebra_puzzles",
)  # fmt: skip
SEEDS, SPACING = 10**6, 10**6
# Some items have no answer; most do.
MAX_TRIES = 100


@dataclass(frozen=True)
class Gym:
    """Items of one task, with that task's own `settings`, such as {"min_terms": 2} for chain_sum.

    The only worked response is the bare answer: the package writes no steps.
    """

    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    trace_kinds = ("right",)

    def draw(self, index: int, rng: random.Random) -> Question:
        for _ in range(MAX_TRIES):
            item = self._item(rng.randrange(SEEDS) * SPACING)
            text, answer = item.get("question"), folded(str(item.get("answer") or ""))
            if isinstance(text, str) and text.strip() and 0 < len(answer) <= MAX_ANSWER_CHARS:
                return Question(ask(text.strip(), "the answer"), frozenset({answer}))
        raise UserError(f"reasoning-gym's {self.task} gave no item with an answer; choose other settings")

    def _item(self, seed: int) -> Mapping[str, Any]:
        if self.task not in TASKS:
            raise UserError(refusal(self.task))
        try:
            create = importlib.import_module("reasoning_gym").create_dataset
        except ModuleNotFoundError as error:
            raise UserError(
                f"questions of reasoning-gym need the package: pip install 'tempo-engine[gym]' ({first_sentence(error)})"
            ) from error
        try:
            return create(self.task, size=1, seed=seed, **self.settings)[0]
        except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError) as error:
            raise UserError(f"reasoning-gym's {self.task} refuses its settings: {first_sentence(error)}") from error

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        return f"Answer: {next(iter(question.answers))}"

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> None:
        return None


def refusal(task: str) -> str:
    """Why a task outside the list is not taken."""
    return f"the gym task {task!r} is not among those whose answers can be compared as text: {', '.join(TASKS)}"
