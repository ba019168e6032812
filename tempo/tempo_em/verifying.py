"""`verifier` of a source of rows -> who says what is right."""

import os

from tempo_engine.data.columns import Columns
from tempo_engine.data.load import ASKED, REFERENCE, Loaded
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import EXTRACTORS
from tempo_engine.verify import ExactMatch, Verifier
from tempo_engine.verify.expression import Expression
from tempo_engine.verify.functions import RewardFunction
from tempo_engine.verify.judge import PROMPT, Judge, JudgeOptions
from tempo_engine.verify.kinds import KINDS
from tempo_engine.verify.pool import Pool

from tempo_em.recipe_verifier import JudgeRecipe, VerifierRecipe


def make_verifier(how: VerifierRecipe, stated: str, loaded: Loaded, pool: Pool) -> Verifier:
    """Who says what is right of these questions; `stated`: where a response has its answer (boxed, answer_line, whole).

    Raises UserError for a function that asks for what the rows lack, and for a judge without its key.
    """
    find = EXTRACTORS[stated]
    if how.compares_answers:
        extract = KINDS[how.type or "exact"].extract(find)
        return Expression(extract, pool) if how.type == "expression" else ExactMatch(extract)
    columns = loaded.columns or Columns(ASKED, REFERENCE, None)  # a benchmark's
    names = {"prompt_column": columns.prompt, "answer_column": columns.answer}
    if how.judge is not None:
        return Judge(_judge_options(how.judge), find, **names)
    assert how.function is not None
    function = RewardFunction(how.function, find, **names, seconds=how.timeout_s)
    function.check_columns(list(loaded.questions[0].columns), loaded.intake.where)
    return function


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
