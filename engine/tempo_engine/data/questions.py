"""A row's values -> a question: what counts as a prompt and as an answer."""

from collections.abc import Mapping
from typing import Any

from tempo_engine.data.columns import Columns, look_up
from tempo_engine.data.rows import BadRow
from tempo_engine.tasks.answers import MAX_ANSWER_CHARS, canonical
from tempo_engine.tasks.question import Question


def question_of(row: Mapping[str, Any], columns: Columns) -> Question:
    """The question in a row, with the row beside it. Raises BadRow when it has none."""
    content = content_of(look_up(row, columns.prompt))
    answers = frozenset() if columns.answer is None else answers_of(look_up(row, columns.answer))
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


def answers_of(answer: Any) -> frozenset[str]:
    """One answer (text or number), or a list of equally right ones. Raises BadRow for anything else."""
    options = answer if isinstance(answer, list) else [answer]
    if not options or not all(isinstance(a, str | int | float) and not isinstance(a, bool) for a in options):
        raise BadRow(f": the answer must be text, a number or a list of them, got {str(answer)[:60]!r}")
    answers = frozenset(canonical(str(a)) for a in options)
    if not all(0 < len(a) <= MAX_ANSWER_CHARS for a in answers):
        raise BadRow(f": an answer must have 1 to {MAX_ANSWER_CHARS} characters, else no response could match it")
    return answers
