"""Sources of rows in a recipe -> where they lie and how they are read."""

from collections.abc import Callable
from dataclasses import replace

from tempo_engine.data.benchmarks import BENCHMARKS
from tempo_engine.data.hub import Where
from tempo_engine.data.load import Loaded, Reading, load
from tempo_engine.data.style import Style
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import EXTRACTORS
from tempo_engine.tasks.question import Split

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

# A grid or a free text is no exact match of an answer.
NEEDS_MORE = ("grid", "judge")


def sources_of(data: DataRecipe) -> dict[str, Source]:
    """Every source by the name of its set, evaluation.NAME for further ones."""
    further = {f"evaluation.{name}": source for name, source in data.evaluation.items()}
    return {"labelled": data.labelled, "unlabelled": data.unlabelled, **further}


def load_rows(source: RowsSource, split: Split, name: str) -> Loaded:
    """The questions of a source of rows. Raises UserError for whatever is wrong with it."""
    reading = Reading(filter=source.filter, limit=source.limit, max_bad_rows=source.max_bad_rows)
    if isinstance(source, DatasetSource):
        benchmark = BENCHMARKS[source.dataset]
        return load(benchmark.places(source.subset), replace(reading, benchmark=benchmark), split, name)
    assert isinstance(source, ColumnsSource)
    reading = replace(reading, prompt=source.prompt, answer=source.answer)
    return load([_where(source)], reading, split, name)


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


def extractor(source: RowsSource) -> Callable[[str], str | None]:
    """How an answer is read out of a response to a question of this source.

    Raises UserError for a benchmark whose answers cannot be compared as text.
    """
    if not isinstance(source, DatasetSource):
        assert isinstance(source, ColumnsSource)
        return EXTRACTORS[source.extract]
    benchmark = BENCHMARKS[source.dataset]
    if source.extract is None and benchmark.verifier in NEEDS_MORE:
        raise UserError(
            f"answers of {source.dataset} are for a verifier of kind {benchmark.verifier}, not for comparison as text; "
            "set extract if that is what you want"
        )
    return EXTRACTORS[source.extract or benchmark.extract]
