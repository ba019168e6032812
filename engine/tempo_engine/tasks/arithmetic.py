"""Expressions with +, -, * and brackets, worked out one operation at a time.

prompt    What is 3 * ( 4 - 6 ) + 5 ? End with "Answer: N".
response  4 - 6 = -2 ; 3 * -2 = -6 ; -6 + 5 = -1 ; Answer: -1
"""

import operator
import random
from dataclasses import dataclass

from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of

# Most small expressions stay within the limit.
MAX_TRIES = 1000
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# The higher binds first.
RANK = {"+": 0, "-": 0, "*": 1}

# A number, or (operation, left, right).
Tree = int | tuple[str, "Tree", "Tree"]


@dataclass(frozen=True)
class Arithmetic:
    """Expressions of `terms` numbers each (a list: sizes in turn), every number between 1 and `largest`.

    `limit`: no result on the way is further from 0, which keeps the vocabulary small.
    """

    terms: tuple[int, ...]
    largest: int = 9
    limit: int = 99

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        terms = self.terms[index % len(self.terms)]
        for _ in range(MAX_TRIES):
            tree = self._tree(terms, rng)
            results = [result for *_, result in _steps(tree)]
            if all(abs(result) <= self.limit for result in results):
                return Question(ask(f"What is {_write(tree)} ?", "N"), frozenset({str(results[-1])}))
        raise UserError(f"no expression of {terms} numbers up to {self.largest} stays within {self.limit}; raise limit")

    def _tree(self, terms: int, rng: random.Random) -> Tree:
        if terms == 1:
            return rng.randint(1, self.largest)
        left = rng.randint(1, terms - 1)
        return rng.choice("+-*"), self._tree(left, rng), self._tree(terms - left, rng)

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: every step holds. `slip`: one step is off by one, and the rest follows from it to a wrong end."""
        tree = _read(asked(str(question.content)).removeprefix("What is ").removesuffix(" ?"))
        steps = _steps(tree)
        if kind == "slip":
            steps = self._slipped(tree, steps, rng)
        return " ; ".join([*(f"{a} {sign} {b} = {c}" for a, sign, b, c in steps), f"Answer: {steps[-1][-1]}"])

    def _slipped(self, tree: Tree, steps: list["Step"], rng: random.Random) -> list["Step"]:
        slips = [(at, by) for at in range(len(steps)) for by in (1, -1)]
        rng.shuffle(slips)
        # A later "* 0" can hide a slip; one of the two at the last step always serves.
        for at, by in slips:
            slipped = _steps(tree, at, by)
            if slipped[-1][-1] != steps[-1][-1] and all(abs(result) <= self.limit for *_, result in slipped):
                return slipped
        raise AssertionError("no slip changes the end")

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        furthest = max(self.limit, self.largest)
        numbers = map(str, range(-furthest, furthest + 1))
        return words_of([ask("What is ( + - * ) ?", "N"), "= ; Answer:", *numbers])


# Left, operation, right, result.
Step = tuple[int, str, int, int]


def _steps(tree: Tree, slip_at: int | None = None, slip: int = 0) -> list[Step]:
    """The operations from the inside out, left before right; the one at `slip_at` is off by `slip`."""
    steps: list[Step] = []

    def value(node: Tree) -> int:
        if isinstance(node, int):
            return node
        sign, left, right = node
        a, b = value(left), value(right)
        result = OPERATIONS[sign](a, b) + (slip if len(steps) == slip_at else 0)
        steps.append((a, sign, b, result))
        return result

    value(tree)
    return steps


def _write(tree: Tree, above: int = 0) -> str:
    """With brackets only where they are needed: around what binds less than the operation `above` asks for."""
    if isinstance(tree, int):
        return str(tree)
    sign, left, right = tree
    rank = RANK[sign]
    # What has the same rank stands on the left without brackets, as is read from left to right.
    text = f"{_write(left, rank)} {sign} {_write(right, rank + 1)}"
    return f"( {text} )" if rank < above else text


def _read(text: str) -> Tree:
    """The tree of a written expression: * before + and -, else from left to right."""
    words = text.split()[::-1]

    def factor() -> Tree:
        word = words.pop()
        if word != "(":
            return int(word)
        inner = chain("+-")
        words.pop()
        return inner

    def chain(signs: str) -> Tree:
        part = factor if signs == "*" else lambda: chain("*")
        tree = part()
        while words and words[-1] in signs:
            tree = (words.pop(), tree, part())
        return tree

    return chain("+-")
