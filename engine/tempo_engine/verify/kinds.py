"""Kinds of answers: each brings right answers and those of responses into one spelling, and then strings are compared.

Pure string work: what a model wrote is never evaluated. What is not of the kind is no answer.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tempo_engine.tasks.answers import MAX_ANSWER_CHARS, Extract, canonical

# A grid is looked for in the end of a response; so many of its last closing braces may be the grid's.
GRID_CHARS = 20_000
GRID_TRIES = 16

_INTEGER = re.compile(r"-?[0-9]+")
# Spaces of LaTeX, and commas that it must not space: 1\,000 and 1{,}000.
_THIN = re.compile(r"\\[,!;: ]|\{,\}")
_MARKUP = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf)\s*\{([^{}]*)\}")
# A, (A), [A], A., A), with the choice's own text behind it or without.
_CHOICE = re.compile(r"(?:[(\[]\s*([A-Za-z])\s*[)\]][.:]?|([A-Za-z])[.):])(?:\s+(.*))?|([A-Za-z])")
# Another choice beside the first: "(A) or (B)", "A. B.", "A) and C".
_SECOND = re.compile(
    r"[(\[]\s*[A-Za-z]\s*[)\]]|(?:^|[\s,/&;])[A-Z][.)](?:\s|$)|(?:^|\s)(?:or|and|&|/)\s*[A-Z]$|^[A-Z]$"
)
_WORD = re.compile(r"[-+]?[0-9](?:[0-9.,:/]*[0-9])?|\w+")
_ARTICLES = frozenset({"a", "an", "the"})
# Characters that change what is seen or cannot be written down: control, zero width, bidirectional, tags, lone surrogates.
_DECEPTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class Kind:
    """What a right answer must be (`wants`, for messages), how any answer is brought into one spelling (`read`, None for what is
    no such answer), and where a response states it: None leaves that to the recipe."""

    wants: str
    read: Callable[[str], str | None]
    find: Extract | None = None

    def extract(self, find: Extract) -> Extract:
        """response -> its answer in one spelling."""
        find = self.find or find

        def extract(response: str) -> str | None:
            found = find(response)
            return None if found is None else self.read(found)

        return extract


def is_deceptive(text: str) -> bool:
    """Whether it holds characters that no honest answer needs."""
    return _DECEPTIVE.search(text) is not None


def exact(answer: str) -> str | None:
    text = canonical(answer)
    return text if 0 < len(text) <= MAX_ANSWER_CHARS else None


def integer(answer: str) -> str | None:
    r"""42, +042, 1,000, 1{,}000, 42.0 and $42$ have one spelling each; x = 42 and 42 km are no integers."""
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    text = canonical(_THIN.sub(lambda thin: "," if thin[0] in (r"\,", "{,}") else "", answer))
    return text if _INTEGER.fullmatch(text) else None


def choice(answer: str) -> str | None:
    """The capital letter of A, (A), A., **A**, "(a) its text"; None for two of them."""
    if len(answer) > MAX_ANSWER_CHARS or is_deceptive(answer):
        return None
    text = _MARKUP.sub(r"\1", answer).strip(" \t\n*_$`")
    found = _CHOICE.fullmatch(" ".join(text.split()).rstrip("*_$` "))
    if not found or (found[3] and _SECOND.search(found[3])):
        return None
    return (found[1] or found[2] or found[4]).upper()


def text(answer: str) -> str | None:
    """Words and numbers without case, articles and punctuation: "The  Nile!" is "nile", and -3.5 stays what it is."""
    if is_deceptive(answer):
        return None
    words = _WORD.findall(answer.casefold())
    return " ".join([word for word in words if word not in _ARTICLES] or words) or None


def grid(answer: str) -> str | None:
    """ZebraLogic's solution, {"House 1": {"Name": "Eric", ...}, ...}, in one spelling of houses, attributes and values.

    Also inside of {"solution": ...}, and as a table {"header": ["House", "Name"], "rows": [["1", "Eric"]]}.
    """
    if len(answer) > GRID_CHARS:
        return None
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    found = found.get("solution", found) if isinstance(found, dict) else found
    houses = _from_table(found) if isinstance(found, dict) and {"header", "rows"} <= found.keys() else found
    if not isinstance(houses, dict) or not houses:
        return None
    cells = {}
    for house, attributes in houses.items():
        if not isinstance(attributes, dict) or not attributes:
            return None
        for name, value in attributes.items():
            if not isinstance(value, str | int) or isinstance(value, bool) or is_deceptive(f"{house}{name}{value}"):
                return None
            cells[f"{_folded(house)} / {_folded(name)}"] = _folded(str(value))
    return json.dumps(cells, sort_keys=True, ensure_ascii=False)


def last_object(response: str) -> str | None:
    """The last complete JSON object of a response that holds a grid."""
    tail = response[-GRID_CHARS:]
    spans, opened = [], list[int]()
    for brace in re.finditer("[{}]", tail):  # values of a grid hold no braces
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            spans.append((opened.pop(), brace.end()))
    last = reversed(spans[-GRID_TRIES:])
    return next((tail[start:end] for start, end in last if grid(tail[start:end])), None)


def _from_table(table: dict[str, Any]) -> dict[str, Any] | None:
    header, rows = table["header"], table["rows"]
    is_table = (
        isinstance(header, list)
        and len(header) > 1
        and isinstance(rows, list)
        and all(isinstance(r, list) for r in rows)
    )
    if not is_table or not all(len(row) == len(header) for row in rows):
        return None
    return {f"House {row[0]}": dict(zip(map(str, header[1:]), row[1:], strict=True)) for row in rows}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


KINDS: dict[str, Kind] = {
    "exact": Kind(f"1 to {MAX_ANSWER_CHARS} characters", exact),
    "int": Kind("an integer", integer),
    "expression": Kind(f"1 to {MAX_ANSWER_CHARS} characters", exact),
    "choice": Kind("the letter of a choice", choice),
    "grid": Kind('a grid {"House 1": {"Name": "Eric", ...}, ...}', grid, last_object),
    "text": Kind("words or numbers", text),
}
