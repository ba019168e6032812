"""Mathematical equality: 1/2 is 0.5 is \\frac{2}{4}. Strings decide what they can; the rest goes to math-verify, see `pool`."""

import re
from collections.abc import Sequence

from tempo_engine.rollout import Labelled, Rollout
from tempo_engine.tasks.answers import MAX_ANSWER_CHARS, Extract, canonical
from tempo_engine.verify.kinds import is_deceptive
from tempo_engine.verify.pool import Pair, Pool

MAX_DEPTH = 20
_INTEGER = re.compile(r"-?[0-9]+")
_SPACING = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,!;:]")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_WORDS = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)*")
_TEXT = re.compile(r"\\text(?:bf|rm|it)?\s*\{([^{}]*)\}")
# Numbers beyond any answer, and factorials that need none of the digits of a hang.
_EXCESS = re.compile(r"[0-9]{100}|[0-9]{5}[\s)}\]]*!|!\s*!")
_UNESCAPED_DOLLAR = re.compile(r"(?<!\\)\$")
_NUMERIC_COMMAND = re.compile(
    r"\\(?:frac|sqrt|cdot|times|div|pi|pm|binom|dbinom|ln|log|sin|cos|tan|circ|text|mathrm)(?![A-Za-z])"
)
# One "=" that compares: not \neq, <=, >=, ==, :=.
_EQUALS = re.compile(r"(?<![<>!=:\\])=(?!=)")


class Expression:
    """1.0 when the extracted answer equals one of the right ones mathematically, else 0.0. Verifiers may share a pool."""

    def __init__(self, extract: Extract, pool: Pool) -> None:
        self._extract, self.pool = extract, pool

    def extract(self, response: str) -> str | None:
        found = self._extract(response)
        return None if found is None else spelled(found) or None

    def rewards(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[float]:
        asked = [_ways(self.extract(r.text), item.answers) for r, item in zip(responses, items, strict=True)]
        pairs = [pair for ways in asked for way in ways for pair in way]
        equal = dict(zip(pairs, self.pool.compare(pairs), strict=True)) if pairs else {}
        return [float(any(all(equal[pair] for pair in way) for way in ways)) for ways in asked]

    def metrics(self) -> dict[str, float]:
        return self.pool.metrics()

    def close(self) -> None:
        self.pool.close()


def spelled(answer: str) -> str:
    r"""Without what changes nothing: \left, \right, thin spaces, \dfrac for \frac. Votes count these spellings."""
    return canonical(_FRACTION.sub(r"\\frac", _SPACING.sub("", answer)))


def _ways(answer: str | None, golds: frozenset[str]) -> list[list[Pair]]:
    """The ways in which it may be right: one for each right answer that strings do not rule out."""
    if answer is None:
        return []
    ways = [way for gold in sorted(golds) if (way := settle(answer, spelled(gold))) is not None]
    return [[]] if [] in ways else ways


def settle(answer: str, gold: str) -> list[Pair] | None:
    """The comparisons that must all hold; none when strings say that it is right, None when they say that it is wrong.

    Both are in their `spelled` form.
    """
    if answer == gold:
        return []
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return None
    words = _TEXT.sub(r"\1", gold)
    if _WORDS.fullmatch(words):  # a product of letters to mathematics: any anagram would do
        return [] if _TEXT.sub(r"\1", answer).casefold() == words.casefold() else None
    if is_excessive(answer):
        return None
    return [(side, gold) for side in _sides(answer, gold)]


def is_excessive(answer: str) -> bool:
    """Whether it is no answer but an attempt on whoever reads it, or on the text around it."""
    if (
        len(answer) > MAX_ANSWER_CHARS
        or is_deceptive(answer)
        or _EXCESS.search(answer)
        or _UNESCAPED_DOLLAR.search(answer)
    ):
        return True
    if any(c.isdigit() and not c.isascii() for c in answer):
        return True
    depth = deepest = 0
    for c in answer:
        depth += (c in "({[") - (c in ")}]")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


def _sides(answer: str, gold: str) -> list[str]:
    """The parts of an answer that must equal the right one: of "x = 42" the 42, of "6 * 7 = 42" both, or "41 = 42" would pass.

    math-verify takes the last side of an equation, and compares equations with each other whole.
    """
    sides = _EQUALS.split(answer)
    if len(sides) < 2 or _EQUALS.search(gold) or "," in answer:
        return [answer]
    is_number = not re.search("[A-Za-z\\\\]", _NUMERIC_COMMAND.sub("", sides[0]))
    return sides if is_number else sides[1:]
