"""Which columns of a row mean what: TRL's and verl's names are known, any others can be said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempo_engine.data.rows import BadRow

# Tried in this order where the recipe leaves `prompt` or `answer` at its first name. A dot leads into an object.
PROMPTS = ("prompt", "problem", "question")
ANSWERS = ("answer", "solution", "reward_model.ground_truth", "ground_truth")
# TEMPO's own files are verl's with this flag: one file holds labelled and unlabelled questions.
FLAGS = ("reward_model.is_labeled", "reward_model.is_labelled", "is_labeled", "is_labelled", "extra_info.is_labeled")


@dataclass(frozen=True)
class Columns:
    """Columns by their part: Columns("prompt", "reward_model.ground_truth", "reward_model.is_labeled"). None: there is none."""

    prompt: str
    answer: str | None
    flag: str | None

    def __str__(self) -> str:
        parts = [f"prompt = {self.prompt}", f"answer = {self.answer or 'none'}"]
        return ", ".join([*parts, f"labelled where {self.flag}"] if self.flag else parts)


def recognise(row: Mapping[str, Any], prompt: str, answer: str | None) -> Columns:
    """What the columns of a file mean, by one of its rows and what the recipe calls them."""
    flag = next((name for name in FLAGS if has(row, name)), None)
    return Columns(_named(row, prompt, PROMPTS), answer and _named(row, answer, ANSWERS), flag)


def _named(row: Mapping[str, Any], wanted: str, known: Sequence[str]) -> str:
    if has(row, wanted) or wanted != known[0]:
        return wanted
    return next((name for name in known if has(row, name)), wanted)


def has(row: Mapping[str, Any], column: str) -> bool:
    try:
        look_up(row, column)
    except BadRow:
        return False
    return True


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """The value in a column; `a.b` is the entry b of the object in a. Raises BadRow when there is none."""
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    if inner and isinstance(row.get(outer), Mapping):
        return look_up(row[outer], inner)
    raise BadRow(f"has no column {column!r}; its columns are {', '.join(sorted(map(str, row)))}")


def entry(row: Mapping[str, Any], column: str | None, otherwise: Any = None) -> Any:
    """The value in a column, where there is one."""
    return look_up(row, column) if column is not None and has(row, column) else otherwise


def is_labelled(row: Mapping[str, Any], flag: str) -> bool | None:
    """What the flag says of a row; None when the row does not have it. Raises BadRow when it says neither yes nor no."""
    value = look_up(row, flag) if has(row, flag) else None
    if value is None or value in (True, False):  # 0 and 1 too
        return value if value is None else bool(value)
    raise BadRow(f"has {value!r:.60} in the column {flag!r}, want true or false")


def passes(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a row has one of the wanted values in each column. Raises BadRow when a column is missing."""
    for column, values in wanted.items():
        allowed = values if isinstance(values, list | tuple) else [values]
        # YAML writes 2024 for what a column may hold as text.
        if str(look_up(row, column)) not in map(str, allowed):
            return False
    return True
