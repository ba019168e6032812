"""Questions from a JSONL file: one object a line with a prompt (text or chat messages) and, where known, an answer."""

import json
from pathlib import Path
from typing import Any

from tempo_engine.errors import UserError, first_sentence
from tempo_engine.tasks.question import Question
from tempo_engine.verify.kinds import KINDS, Kind


def read_questions(
    path: Path,
    *,
    prompt_column: str,
    answer_column: str | None,
    limit: int | None = None,
    kind: Kind = KINDS["exact"],
    keeps_columns: bool = False,
) -> list[Question]:
    """The file's questions, in order, without repeats of the same content; `keeps_columns`: each with its whole row.

    Raises UserError naming the line when it is not JSON, lacks a column or holds something else there; and for an empty file.
    """
    if not path.is_file():
        raise UserError(f"the data file {path} does not exist")
    found: dict[str, Question] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and (limit is None or len(found) < limit):
                where = f"{path}, line {number}"
                row = _row(line, where, prompt_column, answer_column)
                answers = frozenset() if answer_column is None else _answers(row[answer_column], where, kind)
                columns = row if keeps_columns else {}
                question = Question(_content(row[prompt_column], where), answers, columns=columns)
                found.setdefault(question.id, question)
    if not found:
        raise UserError(f"the data file {path} holds no questions; it needs one JSON object a line")
    return list(found.values())


def _row(line: bytes, where: str, prompt_column: str, answer_column: str | None) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        # JSON can spell lone surrogates, which are no text: nothing downstream could encode them.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, integers of thousands of digits
        raise UserError(f"{where} is not JSON: {first_sentence(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} holds a {type(row).__name__}, want an object with the column {prompt_column!r}")
    for column in filter(None, (prompt_column, answer_column)):
        if column not in row:
            raise UserError(f"{where} has no column {column!r}; its columns are {', '.join(sorted(map(str, row)))}")
    return row


def _content(prompt: Any, where: str) -> str | tuple[tuple[str, str], ...]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(m) for m in prompt):
        return tuple((m["role"], m["content"]) for m in prompt)
    raise UserError(
        f"{where}: the prompt must be text or a list of messages with role and content, got {str(prompt)[:60]!r}"
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _answers(answer: Any, where: str, kind: Kind) -> frozenset[str]:
    """One answer (text or number, a grid also as an object), or a list of equally right ones, each as its kind spells it."""
    options = answer if isinstance(answer, list) else [answer]
    if kind is KINDS["grid"]:
        options = [json.dumps(a) if isinstance(a, dict) else a for a in options]
    if not options or not all(isinstance(a, str | int | float) and not isinstance(a, bool) for a in options):
        raise UserError(f"{where}: the answer must be text, a number or a list of them, got {str(answer)[:60]!r}")
    answers = [kind.read(str(a)) for a in options]
    if None in answers:
        wrong = options[answers.index(None)]
        raise UserError(
            f"{where}: the answer must be {kind.wants}, else no response could match it, got {str(wrong)[:60]!r}"
        )
    return frozenset(a for a in answers if a is not None)
