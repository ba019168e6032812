"""`data` of a recipe: where questions come from."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from tempo_engine.data.benchmarks import BENCHMARKS

from tempo_em.recipe_base import Count, NoiseRate, Positive, SetName, Strict

Extractor = Literal["boxed", "answer_line", "whole"]
Cell = bool | int | float | str
BadRows = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)]
# Nobody can mend a published set, and most have a few broken rows among thousands. Of 30 rows, 1% is none.
PUBLISHED = 0.01


class GeneratedSource(Strict):
    """What all generated sources have."""

    count: Positive
    shots: Count = Field(
        default=0,
        description="worked questions before each, for a model that was not trained on the task; end responses with rollout.stop",
    )


class SignsSource(GeneratedSource):
    """Generated: signs to target (see tempo_engine.tasks.signs)."""

    generator: Literal["signs"]
    terms: tuple[Annotated[int, Field(ge=2, le=10)], ...] = Field(default=(4,), min_length=1)
    largest: int = Field(default=6, ge=1, le=99)
    unique: bool = Field(default=False, description="only questions with exactly one right answer")


class SwapsSource(GeneratedSource):
    """Generated: which of these swaps were made (see tempo_engine.tasks.swaps)."""

    generator: Literal["swaps"]
    terms: tuple[Annotated[int, Field(ge=2, le=10)], ...] = Field(default=(4,), min_length=1)
    unique: bool = Field(default=False, description="only questions with exactly one right answer (up to 6 terms)")


class SumsSource(GeneratedSource):
    """Generated: sums with written-out steps (see tempo_engine.tasks.sums)."""

    generator: Literal["sums"]
    terms: tuple[Annotated[int, Field(ge=2, le=10)], ...] = Field(default=(3,), min_length=1)
    largest: int = Field(default=9, ge=1, le=999)


class RowsSource(Strict):
    """What all sources of rows have."""

    limit: Positive | None = Field(default=None, description="read at most this many questions")
    filter: dict[str, Cell | tuple[Cell, ...]] = Field(
        default={}, description="only rows with this value, or one of these, in each of these columns"
    )
    max_bad_rows: BadRows = Field(
        default=0, description="so many rows, or below 1 such a share of them, may be bad: they are left out and listed"
    )
    template: str | None = Field(
        default=None, description='what is asked: "{prompt}" in it is replaced, all else is taken literally'
    )
    system: str | None = Field(default=None, description="a system prompt, where a row has none; null: that of data")
    chat: bool | None = Field(
        default=None, description="whether a text is sent as a user's message; null: as data says"
    )
    enable_thinking: bool | None = Field(
        default=None, description="for chat templates with this switch; null: as data says"
    )

    @field_validator("template")
    @classmethod
    def asks(cls, template: str | None) -> str | None:
        if template is not None and template.count("{prompt}") != 1:
            raise ValueError("a template needs {prompt} once, where the question goes")
        if template is not None and "{{}}" in template:
            raise ValueError("a template is taken literally, so write \\boxed{} with single braces")
        return template


class ColumnsSource(RowsSource):
    """Rows whose columns have names: TRL's and verl's are recognised where these are left alone."""

    prompt: str = Field(default="prompt", description="column with the prompt: text or chat messages")
    answer: str | None = Field(default="answer", description="column with the answer, or null when there is none")
    extract: Extractor = Field(default="boxed", description="where a response states its answer")


class JsonlSource(ColumnsSource):
    """A JSONL file: one object a line."""

    jsonl: Path


class ParquetSource(ColumnsSource):
    """A Parquet file."""

    parquet: Path


class HubSource(ColumnsSource):
    """A data set of the Hugging Face Hub, of one commit."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="its name: organisation/name")
    revision: str | None = Field(
        default=None, description="commit; a branch, tag or null is resolved, and the commit recorded with the run"
    )
    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = Field(default=(), description="patterns of its files, instead of config and split")
    max_bad_rows: BadRows = PUBLISHED


class DatasetSource(RowsSource):
    """A published benchmark by name (`tempo-engine data` lists them): commit, columns, prompt and form of answer are known."""

    dataset: str
    subset: str | None = Field(default=None, description="of data sets with several parts; null: all of them")
    extract: Extractor | None = Field(
        default=None, description="where a response states its answer; null: where it is asked to"
    )
    max_bad_rows: BadRows = PUBLISHED

    @model_validator(mode="after")
    def known(self) -> "DatasetSource":
        if self.dataset not in BENCHMARKS:
            raise ValueError(
                f"there is no data set {self.dataset!r}; there are {', '.join(BENCHMARKS)} (or give hub: ORG/NAME)"
            )
        parts = BENCHMARKS[self.dataset].parts
        if self.subset is not None and self.subset not in parts:
            raise ValueError(f"{self.dataset} has no subset {self.subset!r}; it has {', '.join(parts)}")
        return self


# A source of rows is known by the key that says where they lie.
ROWS_TAGS = ("jsonl", "parquet", "hub", "dataset")


def source_tag(value: Any) -> str | None:
    """The kind of a source of questions; None when this does not say."""
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return next((tag for tag in ROWS_TAGS if tag in fields), None) or fields.get("generator")


def _source_tag(value: Any) -> str:
    return str(source_tag(value) or "jsonl")


Source = Annotated[
    Annotated[SignsSource, Tag("signs")]
    | Annotated[SwapsSource, Tag("swaps")]
    | Annotated[SumsSource, Tag("sums")]
    | Annotated[JsonlSource, Tag("jsonl")]
    | Annotated[ParquetSource, Tag("parquet")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[DatasetSource, Tag("dataset")],
    Discriminator(_source_tag),
]


class DataRecipe(Strict):
    """Three kinds of prompts. Answers of `unlabelled`, where they exist, are used for audit metrics only."""

    labelled: Source
    unlabelled: Source
    evaluation: dict[SetName, Source] = Field(
        default={}, description="further sets by name, for example labelled_heldout"
    )
    system: str = Field(default="", description="a system prompt for all sources, where a row has none")
    chat: bool | None = Field(
        default=None, description="whether texts are sent as a user's message; null: where something else here needs it, and for "
        "published benchmarks where the tokenizer has a chat template",
    )  # fmt: skip
    enable_thinking: bool | None = Field(default=None, description="for chat templates with this switch")
    label_noise: NoiseRate = Field(
        default=0.0, description="an experiment: so many labelled questions have their training verdicts turned round"
    )

    @model_validator(mode="after")
    def names(self) -> "DataRecipe":
        if "unlabelled" in self.evaluation:
            raise ValueError("evaluation.unlabelled is reserved for the audit of data.unlabelled; choose another name")
        return self
