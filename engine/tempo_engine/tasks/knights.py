"""Knights, who always tell the truth, and knaves, who always lie: who is what?

prompt    Knights always tell the truth, knaves always lie. Ann says: Bob is a knave. Bob says: Ann and Bob are alike. What are
          Ann, Bob? End with "Answer: knight or knave for each, in this order".
response  knight knight : not Ann ; knight knave : fits ; Answer: knight, knave

A response goes through the possibilities in order and names the first one whose kind and statement disagree, until one fits.
"""

import itertools
import random
import re
from dataclasses import dataclass

from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of

# About one list of statements in four has exactly one solution.
MAX_TRIES = 1000
PEOPLE = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay")
KINDS = ("knight", "knave")
RULE = "Knights always tell the truth, knaves always lie."
FORM = "knight or knave for each, in this order"
_SAYS = re.compile(r"(\w+) says: ([^.]+)\.")

# Who is a knight, in the order of PEOPLE.
Assignment = tuple[bool, ...]


@dataclass(frozen=True)
class Knights:
    """Puzzles of `people`, 2 to 6 (a list: sizes in turn), each of whom says one thing, with exactly one solution."""

    people: tuple[int, ...]

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        names = PEOPLE[: self.people[index % len(self.people)]]
        for _ in range(MAX_TRIES):
            said = {name: rng.choice(_statements(names)) for name in names}
            solutions = [kinds for kinds in _assignments(len(names)) if _odd_one(kinds, said) is None]
            if len(solutions) == 1:
                statements = " ".join(f"{name} says: {statement}." for name, statement in said.items())
                text = f"{RULE} {statements} What are {', '.join(names)}?"
                return Question(ask(text, FORM), frozenset({" ".join(_named(solutions[0]))}))
        raise UserError(f"no puzzle of {len(names)} people with one solution was found; change people")

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: every possibility is judged rightly. `slip`: one that does not fit is said to."""
        said = dict(_SAYS.findall(asked(str(question.content))))
        odd_ones = {kinds: _odd_one(kinds, said) for kinds in _assignments(len(said))}
        taken = rng.choice([k for k, odd in odd_ones.items() if (odd is None) == (kind == "right")])
        steps = []
        for kinds, odd in odd_ones.items():
            if kinds == taken:
                break
            # A slip may lie behind the solution, which then is said not to fit.
            steps.append(f"{' '.join(_named(kinds))} : not {odd or rng.choice(list(said))}")
        named = _named(taken)
        return " ; ".join([*steps, f"{' '.join(named)} : fits", f"Answer: {', '.join(named)}"])

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        names = PEOPLE[: max(self.people)]
        texts = [
            ask(f"{RULE} {name} says: {s}. What are {name}, {name}?", FORM)
            for name in names
            for s in _statements(names)
        ]
        return words_of([*texts, "knight knave knight, knave, : ; not fits Answer:", *names])


def _statements(names: tuple[str, ...]) -> list[str]:
    """All that can be said of one person or two."""
    of_one = [f"{name} is a {kind}" for name in names for kind in KINDS]
    return of_one + [
        f"{a} and {b} {how}" for a, b in itertools.combinations(names, 2) for how in ("are alike", "differ")
    ]


def _assignments(people: int) -> list[Assignment]:
    return list(itertools.product((True, False), repeat=people))


def _odd_one(kinds: Assignment, said: dict[str, str]) -> str | None:
    """The first of the people whose kind and statement disagree; None when this is a solution."""
    is_knight = dict(zip(said, kinds, strict=True))
    return next((name for name, statement in said.items() if is_knight[name] != _is_true(statement, is_knight)), None)


def _is_true(statement: str, is_knight: dict[str, bool]) -> bool:
    words = statement.split()
    if words[1] == "is":
        return is_knight[words[0]] == (words[-1] == "knight")
    return (is_knight[words[0]] == is_knight[words[2]]) == (words[-1] == "alike")


def _named(kinds: Assignment) -> list[str]:
    return [KINDS[0] if is_knight else KINDS[1] for is_knight in kinds]
