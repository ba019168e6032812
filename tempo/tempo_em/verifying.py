"""A question file of a recipe -> its questions, and who says what is right."""

import os

from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import EXTRACTORS
from tempo_engine.tasks.jsonl import read_questions
from tempo_engine.tasks.question import Question
from tempo_engine.verify import ExactMatch, Verifier
from tempo_engine.verify.expression import Expression
from tempo_engine.verify.functions import RewardFunction
from tempo_engine.verify.judge import PROMPT, Judge, JudgeOptions
from tempo_engine.verify.kinds import KINDS
from tempo_engine.verify.pool import Pool

from tempo_em.recipe_data import JsonlSource
from tempo_em.recipe_verifier import JudgeRecipe


def read_file(source: JsonlSource, pool: Pool) -> tuple[list[Question], Verifier]:
    """`pool` compares expressions, for all files of a run.

    Raises UserError for a file that cannot be read, that holds answers of another kind, or that lacks what a function asks for.
    """
    how, find = source.verifier, EXTRACTORS[source.extract]
    columns = {"prompt_column": source.prompt, "limit": source.limit}
    if how.compares_answers:
        kind = KINDS[how.type or "exact"]
        questions = read_questions(source.jsonl, answer_column=source.answer, kind=kind, **columns)
        is_expression = how.type == "expression"
        extract = kind.extract(find)
        return questions, Expression(extract, pool) if is_expression else ExactMatch(extract)
    # What these read of a row is their affair: answers of any form, or none.
    questions = read_questions(source.jsonl, answer_column=None, keeps_columns=True, **columns)
    if how.judge is not None:
        return questions, Judge(
            _judge_options(how.judge), find, prompt_column=source.prompt, answer_column=source.answer
        )
    assert how.function is not None
    function = RewardFunction(
        how.function, find, prompt_column=source.prompt, answer_column=source.answer, seconds=how.timeout_s
    )
    function.check_columns(list(questions[0].columns), str(source.jsonl))
    return questions, function


def make_pool() -> Pool:
    """A rank's share of this machine's cores, not more than 8; nothing is started yet."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pool(min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))


def _judge_options(how: JudgeRecipe) -> JudgeOptions:
    key = os.environ.get(how.api_key_env, "") if how.api_key_env else ""
    if how.api_key_env and not key:
        raise UserError(
            f"the judge's key is to be in the environment variable {how.api_key_env}, which is not set; export it"
        )
    return JudgeOptions(
        url=how.url,
        model=how.model,
        key=key,
        prompt=how.prompt or PROMPT,
        concurrency=how.concurrency,
        seconds=how.timeout_s,
        retries=how.retries,
        max_tokens=how.max_tokens,
    )
