"""Sources of rows in a recipe -> where they lie and how they are read."""

from dataclasses import replace

from tempo_engine.data.benchmarks import BENCHMARKS
from tempo_engine.data.hub import Where
from tempo_engine.data.load import Loaded, Reading, load
from tempo_engine.data.style import Style
from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Split
from tempo_engine.verify import Verifier
from tempo_engine.verify.kinds import KINDS
from tempo_engine.verify.pool import Pool

from tempo_em.recipe_data import (
    ColumnsSource,
    DataRecipe,
    DatasetSource,
    HubSource,
    JsonlSource,
    ParquetSource,
    RowsSource,
    Source,
)
from tempo_em.verifying import make_verifier


def sources_of(data: DataRecipe) -> dict[str, Source]:
    """Every source by the name of its set, evaluation.NAME for further ones."""
    further = {f"evaluation.{name}": source for name, source in data.evaluation.items()}
    return {"labelled": data.labelled, "unlabelled": data.unlabelled, **further}


def load_rows(source: RowsSource, split: Split, name: str, pool: Pool) -> tuple[Loaded, Verifier]:
    """The questions of a source of rows, and who says what is right; `pool` compares expressions, for all sources of a run.

    Raises UserError for whatever is wrong with it: rows that cannot be read, answers of another kind, a function's columns.
    """
    how = source.verified
    # What functions and judges read of a row is their affair: answers of any form, or none.
    kind = KINDS[how.type or "exact"] if how.compares_answers else None
    reading = Reading(filter=source.filter, limit=source.limit, max_bad_rows=source.max_bad_rows, kind=kind)
    if isinstance(source, DatasetSource):
        benchmark = BENCHMARKS[source.dataset]
        places, reading = benchmark.places(source.subset), replace(reading, benchmark=benchmark)
    else:
        assert isinstance(source, ColumnsSource)
        places, reading = [_where(source)], replace(reading, prompt=source.prompt, answer=source.answer)
    loaded = load(places, reading, split, name)
    return loaded, make_verifier(how, source.stated, loaded, pool)


def _where(source: ColumnsSource) -> Where:
    if isinstance(source, JsonlSource):
        return Where(file=source.jsonl)
    if isinstance(source, ParquetSource):
        return Where(file=source.parquet)
    assert isinstance(source, HubSource)
    return Where(hub=source.hub, revision=source.revision, config=source.config, split=source.split, files=source.files)


def style_of(data: DataRecipe, source: Source) -> Style:
    """How questions of a source are asked. Raises UserError where a system prompt or a thinking switch finds no chat."""
    own = source if isinstance(source, RowsSource) else None
    system = data.system if own is None or own.system is None else own.system
    chat = data.chat if own is None or own.chat is None else own.chat
    thinking = data.enable_thinking if own is None or own.enable_thinking is None else own.enable_thinking
    if chat is False and (system or thinking is not None):
        raise UserError(
            "data.system and enable_thinking are said in chat messages, but chat is false; remove one of them"
        )
    if chat or system or thinking is not None:
        mode = "yes"
    else:
        mode = "if_possible" if chat is None and isinstance(source, DatasetSource) else "no"
    return Style(own.template if own else None, system, mode, thinking)
