"""A question as data, the split that keeps sets apart, and what a generator of questions offers."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tempo_engine.errors import UserError

Split = Literal["labelled", "unlabelled", "heldout"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question before tokenisation: Question("3 5 = (8)", answers=frozenset({"+3+5"})).

    `content` is plain text, or chat messages as (role, text) pairs. `answers` holds every right answer, if known. `shown`: the
    prompt's text where that is more than the content, such as worked questions before it. `part`: which generator of a mix drew
    it. `columns`: its row of a file, for verifiers that read more than answers; like the answers, never part of a Prompt.
    """

    content: str | tuple[tuple[str, str], ...]
    answers: frozenset[str] = frozenset()
    shown: str = ""
    part: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def id(self) -> str:
        """Hash of the content: the same question has the same id wherever it comes from."""
        return hashlib.blake2b(repr(self.content).encode(), digest_size=8).hexdigest()


class Generator(Protocol):
    """Questions made by a program, with worked responses for a supervised cold start."""

    @property
    def trace_kinds(self) -> Sequence[str]:
        """Kinds of worked response: how often each is written is the recipe's choice."""
        ...

    def draw(self, index: int, rng: random.Random) -> Question:
        """A question; `index` walks through the sizes, so a set holds equally many of each."""
        ...

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """A worked response of the given kind."""
        ...

    def extract(self, response: str) -> str | None:
        """The answer a response gives, in canonical form; None when it gives none."""
        ...

    def vocabulary(self) -> list[str] | None:
        """Every whitespace-separated word that prompts and traces can contain; None where nobody knows them all."""
        ...


def split_of(question: Question) -> Split:
    """The split a question belongs to, from its content alone: half labelled, a quarter unlabelled, a quarter held out.

    So no seed can put one question into two splits.
    """
    quarter = int(question.id, 16) % 4
    return "unlabelled" if quarter == 0 else "heldout" if quarter == 1 else "labelled"


def draw_questions(generator: Generator, split: Split, count: int, *, seed: int, where: str) -> list[Question]:
    """`count` different questions of one split, the same for the same seed.

    Raises UserError when the generator does not have that many.
    """
    rng = random.Random(f"{where}/{split}/{seed}")
    found: dict[str, Question] = {}
    attempts = 0
    while len(found) < count:
        question = generator.draw(len(found), rng)
        if split_of(question) == split:
            found.setdefault(question.id, question)
        attempts += 1
        if attempts > 1000 + 200 * count:
            raise UserError(
                f"{where} asks for {count} different questions but its generator found only {len(found)}; "
                "lower count or allow more terms"
            )
    return list(found.values())


def check_disjoint(sources: Mapping[str, Sequence[Question]]) -> None:
    """Raises UserError when two of these sources share a question (by content)."""
    owner: dict[str, str] = {}
    for name, questions in sources.items():
        for question in questions:
            other = owner.setdefault(question.id, name)
            if other != name:
                raise UserError(
                    f"{name} and {other} share a question ({str(question.content)[:60]!r}); "
                    "remove it from one of them: a shared question would leak labels"
                )
