"""A row's values -> a question: what counts as a prompt and as an answer."""

import json
from collections.abc import Mapping
from typing import Any

from tempo_engine.data.columns import Columns, look_up
from tempo_engine.data.rows import BadRow
from tempo_engine.tasks.question import Question
from tempo_engine.verify.kinds import KINDS, Kind


def question_of(row: Mapping[str, Any], columns: Columns, kind: Kind) -> Question:
    """The question in a row, with the row beside it. Raises BadRow when it has none, or an answer of another kind."""
    content = content_of(look_up(row, columns.prompt))
    answers = frozenset() if columns.answer is None else answers_of(look_up(row, columns.answer), kind)
    return Question(content, answers, columns=row)


def content_of(prompt: Any) -> str | tuple[tuple[str, str], ...]:
    """Text, or messages as (role, text) pairs. Raises BadRow for anything else."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(m) for m in prompt):
        return tuple((m["role"], m["content"]) for m in prompt)
    raise BadRow(f": the prompt must be text or a list of messages with role and content, got {str(prompt)[:60]!r}")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def answers_of(answer: Any, kind: Kind = KINDS["exact"]) -> frozenset[str]:
    """One answer (text or number, a grid also as an object), or a list of equally right ones, each as its kind spells it.

    Raises BadRow for anything else.
    """
    options = answer if isinstance(answer, list) else [answer]
    if kind is KINDS["grid"]:
        options = [json.dumps(a) if isinstance(a, dict) else a for a in options]
    if not options or not all(isinstance(a, str | int | float) and not isinstance(a, bool) for a in options):
        raise BadRow(f": the answer must be text, a number or a list of them, got {str(answer)[:60]!r}")
    answers = [kind.read(str(a)) for a in options]
    if None in answers:
        wrong = options[answers.index(None)]
        raise BadRow(f": the answer must be {kind.wants}, else no response could match it, got {str(wrong)[:60]!r}")
    return frozenset(a for a in answers if a is not None)
