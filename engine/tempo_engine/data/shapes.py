"""Rows of published benchmarks -> questions: the bare problem as content, the exact prompt as what is shown."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tempo_engine.data.columns import look_up
from tempo_engine.data.questions import answers_of, content_of
from tempo_engine.data.rows import BadRow
from tempo_engine.tasks.answers import canonical
from tempo_engine.tasks.question import Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A reference answer or a grid is longer than what is read out of a response as its answer.
MAX_REFERENCE_CHARS = 20_000

BOXED = "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{}.\n\n"
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without "
    "quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'ANSWER: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering.\n\n"
)
SHORT = (
    "Answer the following question. The last line of your response should be of the following format: 'ANSWER: $ANSWER' (without "
    "quotes) where $ANSWER is the answer to the question. Think step by step before answering.\n\n"
)
# ZebraLogic's own prompt, word for word (Lin et al., arXiv 2502.01100; ZeroEval's ZEBRA_GRID): accuracies compare only under it.
GRID = """
# Example Puzzle\x20

There are 3 houses, numbered 1 to 3 from left to right, as seen from across the street. Each house is occupied by a \
different person. Each house has a unique attribute for each of the following characteristics:
 - Each person has a unique name: `Peter`, `Eric`, `Arnold`.
 - Each person has a unique favorite drink: `tea`, `water`, `milk`

## Clues for the Example Puzzle

1. Peter is in the second house.
2. Arnold is directly left of the one who only drinks water.
3. The one who only drinks water is directly left of the person who likes milk.

## Answer to the Example Puzzle

{
    "reasoning": "Given Clue 1, we know Peter is in House 2. According to Clue 2, Arnold is directly left of the one who only \
drinks water. The person in House 3 cannot be on the left of anyone, so Arnold must be in House 1. Thus, Peter drinks water, and \
Eric lives in House 3. Then, according to Clue 3, Eric drinks milk. Therefore, Arnold drinks tea.",
    "solution": {
        "House 1": {
            "Name": "Arnold",
            "Drink": "tea"
        },
        "House 2": {
            "Name": "Peter",
            "Drink": "water"
        },
        "House 3": {
            "Name": "Eric",
            "Drink": "milk"
        }
    }
}

# Puzzle to Solve\x20

{puzzle}


# Instruction

Now please solve the above puzzle. Present your reasoning and solution in the following json format:

{json_template}

"""

_AGIEVAL = re.compile(r"Q:\s*(.*?)\s*Answer Choices:.*", re.DOTALL)
_AGIEVAL_MATH = re.compile(r"Q:\s*(.*?)\s*A:(?: The answer is)?\s*", re.DOTALL)


def boxed(prompt: str, answer: str) -> Callable[[Mapping[str, Any]], Question]:
    """Problems whose columns have these names; the answer goes into a box."""

    def question(row: Mapping[str, Any]) -> Question:
        return _boxed(_text(row, prompt), answers_of(look_up(row, answer)), row)

    return question


def _boxed(problem: str, answers: frozenset[str], row: Mapping[str, Any]) -> Question:
    return Question(problem, answers, BOXED + problem, columns=row)


def dapo(row: Mapping[str, Any]) -> Question:
    """verl's rows, whose one message has the instructions around the problem."""
    content = content_of(look_up(row, "prompt"))
    text = content if isinstance(content, str) else content[-1][1]
    problem = text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
    answers = answers_of(look_up(row, "reward_model.ground_truth"))
    return Question(problem, answers, DAPO_BEFORE + problem + DAPO_AFTER, columns=row)


def dolci(row: Mapping[str, Any]) -> Question:
    """One user's turn as text ("user: ...") and a reference answer, which is for a judge."""
    text = re.sub(r"\A\s*user:\s*", "", _text(row, "prompt"), flags=re.IGNORECASE)
    reference = look_up(row, "ground_truth")
    reference = reference[0] if isinstance(reference, list) and reference else reference
    return Question(_filled(text, "prompt"), frozenset({_reference(reference)}), columns=row)


def gpqa(row: Mapping[str, Any]) -> Question:
    """The right choice comes first in the file; here the question's own text says in which order they are shown."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    text, choices = _text(row, "Question").strip(), [_text(row, name).strip() for name in names]
    order = list(range(len(choices)))
    random.Random(f"choices/{text}").shuffle(order)
    return _choice(text, [choices[i] for i in order], order.index(0), row)


def agieval(row: Mapping[str, Any]) -> Question:
    """`query` holds the question and its choices in one line, `choices` the choices with their letters."""
    found = _AGIEVAL.fullmatch(_text(row, "query"))
    choices, gold = look_up(row, "choices"), look_up(row, "gold")
    if found is None or not _are_texts(choices) or not isinstance(gold, list) or len(gold) != 1:
        raise BadRow("has no question with choices and exactly one right one")
    bare = [re.sub(r"\A\s*\([A-Z]\)\s*", "", choice) for choice in choices]
    return _choice(found.group(1), bare, gold[0], row)


def agieval_math(row: Mapping[str, Any]) -> Question:
    """Problems between "Q:" and "A: The answer is"."""
    text = _text(row, "query")
    found = _AGIEVAL_MATH.fullmatch(text)
    return _boxed(found.group(1) if found else text, answers_of(look_up(row, "answer")), row)


def bbh(row: Mapping[str, Any]) -> Question:
    """Choices where the target is the letter of one, otherwise a short answer in any case of letters."""
    text, target = _text(row, "question").strip(), _text(row, "target").strip()
    letter = re.fullmatch(r"\(?([A-Z])\)?", target)
    choices = row.get("choices")
    options = choices.get("text") if isinstance(choices, Mapping) else None
    if letter and options and _are_texts(options):
        return _choice(text, options, LETTERS.index(letter.group(1)), row)
    spellings = {canonical(spelling) for spelling in (target, target.lower(), target.capitalize(), target.upper())}
    return Question(text, answers_of(sorted(spellings)), SHORT + text, columns=row)


def zebralogic(row: Mapping[str, Any]) -> Question:
    """A puzzle and its grid: the answer is the grid as JSON, {"House 1": {"Name": ...}, ...}."""
    puzzle, header, rows = _text(row, "puzzle").strip(), look_up(row, "solution.header"), look_up(row, "solution.rows")
    if not _are_texts(header) or not isinstance(rows, list) or not rows:
        raise BadRow("has no grid with a header and rows")
    if not all(_are_texts(house) and len(house) == len(header) for house in rows):
        raise BadRow("has a grid whose rows do not fit its header")
    if any(cell.strip() == "___" for house in rows for cell in house):
        raise BadRow("has a grid whose values are hidden")
    grid = {f"House {house[0]}": dict(zip(header[1:], house[1:], strict=True)) for house in rows}
    blank = {house: dict.fromkeys(values, "___") for house, values in grid.items()}
    form = json.dumps({"reasoning": "___", "solution": blank}, indent=4)
    shown = GRID.replace("{json_template}", form).replace("{puzzle}", _text(row, "puzzle"))
    return Question(puzzle, frozenset({_reference(json.dumps(grid, ensure_ascii=False))}), shown, columns=row)


def _choice(text: str, choices: Sequence[str], right: Any, row: Mapping[str, Any]) -> Question:
    """`right` counts from 0."""
    if not isinstance(right, int) or not 0 <= right < len(choices) <= len(LETTERS):
        raise BadRow(f"names {right!r:.40} as the right one of {len(choices)} choices")
    letters = LETTERS[: len(choices)]
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    content = f"{text}\n\n{listed}"
    shown = CHOICE.replace("{letters}", ",".join(letters)) + content
    letter = letters[right]
    return Question(
        content, frozenset({letter, f"({letter})", letter.lower(), f"({letter.lower()})"}), shown, columns=row
    )


def _text(row: Mapping[str, Any], column: str) -> str:
    value = look_up(row, column)
    if not isinstance(value, str):
        raise BadRow(f"has a {type(value).__name__} in the column {column!r}, want text")
    return _filled(value, column)


def _filled(text: str, column: str) -> str:
    if not text.strip():
        raise BadRow(f"has nothing in the column {column!r}")
    return text


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _reference(answer: Any) -> str:
    if not isinstance(answer, str) or not 0 < len(answer.strip()) <= MAX_REFERENCE_CHARS:
        raise BadRow(f"has no reference answer of 1 to {MAX_REFERENCE_CHARS} characters")
    return answer.strip()
