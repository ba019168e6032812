"""How questions in words are asked, and how their answers are read: on a line of its own after "Answer:"."""

import re
from collections.abc import Iterable

from tempo_engine.tasks.answers import answer_line, canonical

_NAME = re.compile(r"\b[a-z]\s*=\s*")
_BETWEEN = re.compile(r"[\s,;]+")


def ask(question: str, form: str) -> str:
    """The question and how to answer it, in one line: few-shot prompts have a line for each."""
    return f'{question} End with "Answer: {form}".'


def asked(prompt: str) -> str:
    """The question of a prompt that `ask` wrote."""
    return prompt.rpartition(" End with ")[0]


def folded(answer: str) -> str:
    """One spelling for an answer in words or a list: lower case, single spaces for commas, without the names in "x = 3, y = 4"."""
    # Once before the commas go: those of 1,000 are no list.
    text = canonical(_NAME.sub("", answer.lower()))
    return canonical(_BETWEEN.sub(" ", text))


def answer_words(response: str) -> str | None:
    """What follows the last "Answer:" on its line, folded; None without one."""
    found = answer_line(response)
    return (folded(found) or None) if found is not None else None


def words_of(texts: Iterable[str]) -> list[str]:
    """Every whitespace-separated word of these texts, once, in order of appearance."""
    return list(dict.fromkeys(word for text in texts for word in text.split()))
