"""Any generator's questions after a few worked ones: for a model that was never trained on the task, but goes on with a pattern.

    5 + 3 + 8 =                               a worked question, the same ones before every question
    5 + 3 = 8 ; 8 + 8 = 16 ; Answer: 16
    7 + 1 + 6 =                               the question, below which the model goes on

A response is one line. What comes after it does not count, and `rollout.stop: ["\\n"]` in a recipe spares it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Generator, Question, draw_questions

# Other questions than the worked ones are found within a few tries wherever there are any.
MAX_TRIES = 1000


@dataclass(frozen=True)
class FewShot:
    """A generator's questions, each shown after `shots` worked ones, which are never asked.

    What is shown is no part of a question's content, so it belongs to the same split with worked questions and without.
    """

    generator: Generator
    shots: int

    @property
    def trace_kinds(self) -> Sequence[str]:
        return self.generator.trace_kinds

    @cached_property
    def worked(self) -> list[Question]:
        """The same whatever the run's seed, and labelled ones: their answers give nothing away."""
        return draw_questions(self.generator, "labelled", self.shots, seed=0, where="shots")

    @cached_property
    def _pattern(self) -> str:
        rng = random.Random(0)
        return "".join(f"{q.content}\n{self.generator.trace(q, 'right', rng)}\n" for q in self.worked)

    def draw(self, index: int, rng: random.Random) -> Question:
        worked = {question.id for question in self.worked}
        for _ in range(MAX_TRIES):
            question = self.generator.draw(index, rng)
            if question.id not in worked:
                return replace(question, shown=f"{self._pattern}{question.content}\n")
        raise UserError(f"the generator has no other questions than the {self.shots} worked ones; lower shots")

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        return self.generator.trace(question, kind, rng)

    def extract(self, response: str) -> str | None:
        return self.generator.extract(response.partition("\n")[0])

    def vocabulary(self) -> list[str] | None:
        return self.generator.vocabulary()
