"""Reading the answer out of a response and comparing it. Pure string work: model output is never evaluated."""

import re
from collections.abc import Callable

Extract = Callable[[str], str | None]

# A longer "answer" is not one; the bound also keeps comparisons cheap on hostile output.
MAX_ANSWER_CHARS = 300
_INTEGER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.0*)?", re.ASCII)
# Up to the next "Answer:" or the end of the line.
_ANSWER = re.compile(r"answer\s*:((?:(?!answer\s*:).)*)", re.IGNORECASE)


def canonical(answer: str) -> str:
    """One spelling per answer: outer $ and spaces removed, integers without sign +, leading zeros, thousands commas or ".0"."""
    text = " ".join(answer.split()).lstrip("$ ").rstrip("$. ")
    if len(text) <= MAX_ANSWER_CHARS and _INTEGER.fullmatch(text):
        digits = text.split(".")[0].replace(",", "").lstrip("+")
        sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
        digits = digits.lstrip("0") or "0"
        return digits if digits == "0" else sign + digits
    return text


def boxed(response: str) -> str | None:
    r"""The content of the last balanced \boxed{...}, canonical; None without one."""
    end = len(response)
    while (start := response.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), end):
            depth += {"{": 1, "}": -1}.get(response[position], 0)
            if depth == 0:
                return _checked(response[start + len("\\boxed{") : position])
        end = start  # an unclosed box is no answer; an earlier one may be balanced, but only before this one
    return None


def answer_line(response: str) -> str | None:
    """What follows the last "Answer:" on its line, canonical, without Markdown's asterisks; None without one."""
    found = _ANSWER.findall(response)
    return _checked(found[-1].strip("* ")) if found else None


def whole(response: str) -> str | None:
    """The whole response, canonical."""
    return _checked(response)


def _checked(text: str) -> str | None:
    answer = canonical(text)
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


EXTRACTORS: dict[str, Extract] = {"boxed": boxed, "answer_line": answer_line, "whole": whole}


def score(extract: Extract, response: str, answers: frozenset[str]) -> float:
    """1.0 when the response's answer is one of the right ones, else 0.0."""
    return float(extract(response) in answers)
