"""Cups: which of these swaps were made? Four cups stand in the order abcd, some of the listed swaps are made in turn.

    prompt    12 34 13 24 = cabd
    response  +12 bacd -34 bacd +13 cabd -24 cabd

The prompt lists swaps of positions ("13": the first cup and the third) and the order that the cups end in. Each step of a response
is a swap with its sign, + made and - not made, and the order of the cups after it. The answer is the signed swaps, "+12-34+13-24".
The orders are the reasoning: a model that ends on the asked order with one wrong order on the way has fooled itself (a "fudge"),
and a critic has to check every step to see it.
"""

import functools
import itertools
import random
from dataclasses import dataclass

from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question

# A list of up to 6 swaps with a unique answer is found within a few tries.
MAX_TRIES = 1000
START = "abcd"
ORDERS = tuple("".join(order) for order in itertools.permutations(START))
SWAPS = ("12", "13", "14", "23", "24", "34")
SIGNED = tuple(sign + swap for sign in "+-" for swap in SWAPS)
_OTHERS = {swap: tuple(other for other in SWAPS if other != swap) for swap in SWAPS}

# Which of the listed swaps are made, a sign each: ("+", "-", "+", "-").
Choice = tuple[str, ...]


@dataclass(frozen=True)
class Swaps:
    """Questions with `terms` swaps each (a list: sizes in turn), no swap twice in a row: the two would cancel out.

    `unique`: keep only orders that exactly one choice of swaps ends in, all made and none made left out. There are such for up
    to 6 swaps; with 7 every order that is reached is reached in two ways or more (tried for all lists).
    """

    terms: tuple[int, ...]
    unique: bool = False

    trace_kinds = ("right", "miss", "fudge")

    def draw(self, index: int, rng: random.Random) -> Question:
        terms = self.terms[index % len(self.terms)]
        for _ in range(MAX_TRIES):
            swaps = [rng.choice(SWAPS)]
            while len(swaps) < terms:
                swaps.append(rng.choice(_OTHERS[swaps[-1]]))
            choices = _choices(tuple(swaps))
            orders = list(choices)
            if self.unique:
                orders = [order for order, found in choices.items() if len(found) == 1 and len(set(found[0])) == 2]
            if orders:
                asked = rng.choice(orders)
                return Question(f"{' '.join(swaps)} = {asked}", frozenset(_answer(s, swaps) for s in choices[asked]))
        raise UserError(f"no question of {terms} swaps has exactly one answer; lower terms to 6 or less")

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: a solution. `miss`: honest tracking that ends otherwise. `fudge`: one false order makes it end as asked."""
        swaps, asked = _read(question)
        choices = _choices(tuple(swaps))
        if kind == "right":
            return _write(rng.choice(choices[asked]), swaps)
        # There always is a miss: one swap more or less ends in another order.
        signs = rng.choice([signs for order, found in choices.items() if order != asked for signs in found])
        return _fudge(signs, swaps, asked, rng.randrange(len(swaps))) if kind == "fudge" else _write(signs, swaps)

    def extract(self, response: str) -> str | None:
        words = response.strip().split(" ")
        signed, orders = words[::2], words[1::2]
        is_complete = len(signed) == len(orders) and set(signed) <= set(SIGNED) and set(orders) <= set(ORDERS)
        return "".join(signed) if is_complete else None

    def vocabulary(self) -> list[str]:
        return ["=", *SWAPS, *SIGNED, *ORDERS]


def _swapped(order: str, swap: str) -> str:
    cups, (first, second) = list(order), (int(position) - 1 for position in swap)
    cups[first], cups[second] = cups[second], cups[first]
    return "".join(cups)


_AFTER = {sign + swap: {o: _swapped(o, swap) if sign == "+" else o for o in ORDERS} for sign in "+-" for swap in SWAPS}


@functools.cache
def _patterns(terms: int) -> list[Choice]:
    """Every choice of swaps, all made first, none made last."""
    return list(itertools.product("+-", repeat=terms))


@functools.lru_cache(maxsize=1024)
def _choices(swaps: tuple[str, ...]) -> dict[str, list[Choice]]:
    """Every order that the cups can end in, with the choices that end there."""
    ends = [START]
    for swap in swaps:
        after = _AFTER["+" + swap]
        ends = [end for order in ends for end in (after[order], order)]
    choices: dict[str, list[Choice]] = {}
    for signs, end in zip(_patterns(len(swaps)), ends, strict=True):
        choices.setdefault(end, []).append(signs)
    return choices


def _answer(signs: Choice, swaps: list[str]) -> str:
    return "".join(sign + swap for sign, swap in zip(signs, swaps, strict=True))


def _read(question: Question) -> tuple[list[str], str]:
    swaps, asked = str(question.content).split(" = ")
    return swaps.split(), asked


def _write(signs: Choice, swaps: list[str]) -> str:
    return " ".join(_steps(signs, swaps, START))


def _fudge(signs: Choice, swaps: list[str], asked: str, slip_at: int) -> str:
    """The step `slip_at` writes the order from which the steps after it end in the asked one."""
    slip = asked
    for sign, swap in zip(signs[:slip_at:-1], swaps[:slip_at:-1], strict=True):
        slip = _AFTER[sign + swap][slip]  # a swap undoes itself
    honest = _steps(signs[:slip_at], swaps[:slip_at], START)
    rest = _steps(signs[slip_at + 1 :], swaps[slip_at + 1 :], slip)
    return " ".join([*honest, f"{signs[slip_at]}{swaps[slip_at]} {slip}", *rest])


def _steps(signs: Choice, swaps: list[str], order: str) -> list[str]:
    """Each swap with its sign and the order after it, beginning with `order`."""
    steps = []
    for sign, swap in zip(signs, swaps, strict=True):
        order = _AFTER[sign + swap][order]
        steps.append(f"{sign}{swap} {order}")
    return steps
