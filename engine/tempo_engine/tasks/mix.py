"""Several generators in one set: questions of different domains in turn, each generator as often as its weight says."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tempo_engine.tasks.question import Generator, Question
from tempo_engine.tasks.wording import answer_words, words_of


@dataclass(frozen=True)
class Mix:
    """`weights` are whole numbers: with 2 and 1, two questions of three are the first generator's.

    A question remembers whose it is (`part`), so its own generator writes its traces. A response is read without the question: as
    the words on its answer line, or, without one, by those generators whose whole response is the answer. No text means two things:
    such generators' responses have no answer line, and answers are folded alike.
    """

    generators: tuple[Generator, ...]
    weights: tuple[int, ...]

    @property
    def trace_kinds(self) -> Sequence[str]:
        """Those that all of them write."""
        first, *others = (generator.trace_kinds for generator in self.generators)
        return tuple(kind for kind in first if all(kind in kinds for kinds in others))

    @cached_property
    def _turns(self) -> list[int]:
        """Whose turn it is, until it begins anew: of the one that is furthest behind its share, so turns alternate."""
        drawn = [0] * len(self.weights)
        turns = []
        for _ in range(sum(self.weights)):
            part = min(range(len(drawn)), key=lambda p: (2 * drawn[p] + 1) / self.weights[p])
            drawn[part] += 1
            turns.append(part)
        return turns

    def draw(self, index: int, rng: random.Random) -> Question:
        rounds, turn = divmod(index, len(self._turns))
        part = self._turns[turn]
        # How many of its own came before, so that its sizes take turns too.
        before = rounds * self.weights[part] + self._turns[:turn].count(part)
        return replace(self.generators[part].draw(before, rng), part=part)

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        return self.generators[question.part].trace(question, kind, rng)

    def extract(self, response: str) -> str | None:
        answer = answer_words(response)
        if answer is not None:
            return answer
        others = (generator.extract(response) for generator in self.generators)
        return next((answer for answer in others if answer is not None), None)

    def vocabulary(self) -> list[str] | None:
        vocabularies = [generator.vocabulary() for generator in self.generators]
        known = [words for words in vocabularies if words is not None]
        return words_of(word for words in known for word in words) if len(known) == len(vocabularies) else None
