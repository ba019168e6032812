"""Does it follow? Statements about classes, decided by looking for a counterexample.

prompt    All artists are bakers. No bakers are poets. Does it follow that no artists are poets?
          End with "Answer: valid or invalid".
response  A artists B bakers C poets ; possible - B AB C ; some A C : none ; Answer: valid

In a counterexample the premises hold and the conclusion does not. So a response lists the kinds of people that all this leaves
possible ("-" belongs to no class, "AB" to the first and the second), and for each "some" whom it can mean. If nobody is missing,
that is the counterexample.

Only questions whose answer does not depend on whether a class may be empty are drawn: logicians disagree on that.
"""

import random
import re
from dataclasses import dataclass

from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of

# One conclusion in a dozen is valid with three classes, one in fifty with five.
MAX_TRIES = 5000
CLASSES = (
    "artists", "bakers", "climbers", "dancers", "doctors", "farmers", "gardeners", "hunters",
    "lawyers", "painters", "pilots", "poets", "sailors", "singers", "swimmers",
)  # fmt: skip
LETTERS = "ABCDE"
FORM = "valid or invalid"
FOLLOWS = "Does it follow that"
_STATEMENT = re.compile(r"(All|No|Some) (\w+) are (not )?(\w+)[.?]", re.IGNORECASE)
OPPOSITE = {"all": "some not", "some not": "all", "no": "some", "some": "no"}

# A form (all, no, some, some not) and two classes by number. A kind of people is a set of classes, a bit for each.
Statement = tuple[str, int, int]


@dataclass(frozen=True)
class Syllogism:
    """`classes` classes, 3 to 5 (a list: sizes in turn), a premise for each two neighbours, a conclusion about the first and last.

    Half of the conclusions are valid.
    """

    classes: tuple[int, ...]

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        count, is_valid = self.classes[index % len(self.classes)], rng.random() < 0.5
        for _ in range(MAX_TRIES):
            pairs = [(i, i + 1) for i in range(count - 1)] + [(0, count - 1)]
            *premises, conclusion = (_any_statement(*pair, rng) for pair in pairs)
            if _is_valid(premises, conclusion, count) == is_valid and _is_clear(premises, conclusion, count):
                return Question(
                    _written(premises, conclusion, rng.sample(CLASSES, count)), frozenset({_verdict(is_valid)})
                )
        raise UserError(f"no question about {count} classes was found; lower classes")

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: the verdict and its reason. `slip`: somebody impossible is found, or somebody possible is not."""
        classes, premises, conclusion = _read(str(question.content))
        possible = _possible([*premises, _denied(conclusion)], len(classes))
        wanted = [s for s in (*premises, _denied(conclusion)) if s[0].startswith("some")]
        found = [next((k for k in possible if _fits(k, s)), None) for s in wanted]
        if kind == "slip" and None in found:
            # Somebody who would fit, were he possible.
            fitting = [[k for k in range(2 ** len(classes)) if _fits(k, s)] for s in wanted]
            found = [rng.choice(fits) if k is None else k for k, fits in zip(found, fitting, strict=True)]
        elif kind == "slip":
            found[rng.randrange(len(found))] = None
        named = " ".join(f"{letter} {name}" for letter, name in zip(LETTERS, classes, strict=False))
        some = [
            f"some {LETTERS[a]} {'not ' if 'not' in form else ''}{LETTERS[b]} : {'none' if k is None else _letters(k)}"
            for (form, a, b), k in zip(wanted, found, strict=True)
        ]
        return " ; ".join(
            [named, " ".join(["possible", *map(_letters, possible)]), *some, f"Answer: {_verdict(None in found)}"]
        )

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        statements = [f"All No Some {name} are not {name}. all no some {name}?" for name in CLASSES]
        kinds = map(_letters, range(2 ** max(self.classes)))
        return words_of([*statements, ask(FOLLOWS, FORM), "; : possible none Answer: valid invalid", *kinds])


def _any_statement(a: int, b: int, rng: random.Random) -> Statement:
    form, is_turned = rng.choice(list(OPPOSITE)), rng.random() < 0.5
    return (form, b, a) if is_turned else (form, a, b)


def _fits(kind: int, statement: Statement) -> bool:
    """Whether people of this kind are those whom a "some" means, or whom an "all" or "no" forbids."""
    form, a, b = statement
    return bool(kind >> a & 1) and bool(kind >> b & 1) == (form in ("some", "no"))


def _denied(statement: Statement) -> Statement:
    form, a, b = statement
    return OPPOSITE[form], a, b


def _possible(statements: list[Statement], count: int) -> list[int]:
    """The kinds that no statement forbids."""
    forbidding = [s for s in statements if not s[0].startswith("some")]
    return [kind for kind in range(2**count) if not any(_fits(kind, s) for s in forbidding)]


def _is_consistent(statements: list[Statement], count: int, *, peopled: bool = False) -> bool:
    """Whether all can hold at once, with somebody in every class (`peopled`): if so, then with all possible kinds of people."""
    possible = _possible(statements, count)
    holds = all(any(_fits(kind, s) for kind in possible) for s in statements if s[0].startswith("some"))
    return holds and not (peopled and any(all(not kind >> c & 1 for kind in possible) for c in range(count)))


def _is_valid(premises: list[Statement], conclusion: Statement, count: int) -> bool:
    return not _is_consistent([*premises, _denied(conclusion)], count)


def _is_clear(premises: list[Statement], conclusion: Statement, count: int) -> bool:
    """The premises agree, somebody is spoken of, and the verdict is the same with and without empty classes."""
    statements = [*premises, _denied(conclusion)]
    is_same = _is_consistent(statements, count) == _is_consistent(statements, count, peopled=True)
    speaks = any(s[0].startswith("some") for s in statements)
    return is_same and speaks and _is_consistent(premises, count, peopled=True)


def _letters(kind: int) -> str:
    return "".join(letter for c, letter in enumerate(LETTERS) if kind >> c & 1) or "-"


def _verdict(is_valid: bool) -> str:
    return "valid" if is_valid else "invalid"


def _written(premises: list[Statement], conclusion: Statement, classes: list[str]) -> str:
    def sentence(statement: Statement) -> str:
        form, a, b = statement
        return f"{form.split()[0]} {classes[a]} are {'not ' if 'not' in form else ''}{classes[b]}"

    said = " ".join(f"{sentence(premise).capitalize()}." for premise in premises)
    return ask(f"{said} {FOLLOWS} {sentence(conclusion)}?", FORM)


def _read(prompt: str) -> tuple[list[str], list[Statement], Statement]:
    found = _STATEMENT.findall(asked(prompt))
    classes = list(dict.fromkeys(name for _, a, _, b in found[:-1] for name in (a, b)))
    # The classes are numbered along the chain of premises; the letters of a response follow that.
    statements = [(f"{form.lower()} {no}".strip(), classes.index(a), classes.index(b)) for form, a, no, b in found]
    return classes, statements[:-1], statements[-1]
