"""A question file of a recipe -> its questions, and who says what is right."""

import os

from tempo_engine.tasks.answers import EXTRACTORS
from tempo_engine.tasks.jsonl import read_questions
from tempo_engine.tasks.question import Question
from tempo_engine.verify import ExactMatch, Verifier
from tempo_engine.verify.expression import Expression
from tempo_engine.verify.kinds import KINDS
from tempo_engine.verify.pool import Pool

from tempo_em.recipe_data import JsonlSource


def read_file(source: JsonlSource, pool: Pool) -> tuple[list[Question], Verifier]:
    """`pool` compares expressions, for all files of a run.

    Raises UserError for a file that cannot be read, or that holds answers of another kind."""
    kind, find = KINDS[source.verifier.type], EXTRACTORS[source.extract]
    questions = read_questions(
        source.jsonl, prompt_column=source.prompt, answer_column=source.answer, limit=source.limit, kind=kind
    )
    if source.verifier.type == "expression":
        return questions, Expression(kind.extract(find), pool)
    return questions, ExactMatch(kind.extract(find))


def make_pool() -> Pool:
    """A rank's share of this machine's cores, not more than 8; nothing is started yet."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pool(min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
