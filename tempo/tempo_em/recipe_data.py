"""`data` of a recipe: where questions come from."""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from tempo_engine.data.benchmarks import BENCHMARKS

from tempo_em.recipe_base import NoiseRate, Positive, SetName, Strict
from tempo_em.recipe_generated import GENERATORS, GeneratedSource, one_of
from tempo_em.recipe_verifier import VerifierRecipe

Extractor = Literal["boxed", "answer_line", "whole"]
Cell = bool | int | float | str
BadRows = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)]
# Nobody can mend a published set, and most have a few broken rows among thousands. Of 30 rows, 1% is none.
PUBLISHED = 0.01


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

    @property
    @abstractmethod
    def stated(self) -> Extractor:
        """Where a response states its answer."""

    @property
    @abstractmethod
    def verified(self) -> VerifierRecipe:
        """Who says whether a response is right."""

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
    verifier: VerifierRecipe = Field(default=VerifierRecipe(), description="who says whether a response is right")

    @property
    def stated(self) -> Extractor:
        return self.extract

    @property
    def verified(self) -> VerifierRecipe:
        return self.verifier

    @property
    def has_no_answers(self) -> bool:
        return self.answer is None and self.verifier.compares_answers


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
    verifier: VerifierRecipe | None = Field(
        default=None, description="who says whether a response is right; null: as its kind of answer is compared"
    )
    max_bad_rows: BadRows = PUBLISHED

    @property
    def stated(self) -> Extractor:
        return self.extract or BENCHMARKS[self.dataset].extract

    @property
    def verified(self) -> VerifierRecipe:
        return self.verifier or VerifierRecipe.model_validate(BENCHMARKS[self.dataset].verifier)

    @model_validator(mode="after")
    def known(self) -> "DatasetSource":
        if self.dataset not in BENCHMARKS:
            raise ValueError(
                f"there is no data set {self.dataset!r}; there are {', '.join(BENCHMARKS)} (or give hub: ORG/NAME)"
            )
        benchmark = BENCHMARKS[self.dataset]
        if self.subset is not None and self.subset not in benchmark.parts:
            raise ValueError(f"{self.dataset} has no subset {self.subset!r}; it has {', '.join(benchmark.parts)}")
        if self.verifier is None and benchmark.verifier == "judge":
            raise ValueError(
                f"{self.dataset} has free answers, which a language model judges; add verifier: {{judge: {{url: ..., model: ...}}}}"
            )
        return self


# A source of rows is known by the key that says where they lie.
ROWS_TAGS = ("jsonl", "parquet", "hub", "dataset")


def source_tag(value: Any) -> str | None:
    """The kind of a source of questions; None when this does not say."""
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return next((tag for tag in ROWS_TAGS if tag in fields), None) or fields.get("generator")


if TYPE_CHECKING:
    Source = GeneratedSource | RowsSource
else:
    Source = Annotated[
        one_of(GENERATORS)
        | Annotated[JsonlSource, Tag("jsonl")]
        | Annotated[ParquetSource, Tag("parquet")]
        | Annotated[HubSource, Tag("hub")]
        | Annotated[DatasetSource, Tag("dataset")],
        # What says nothing of its kind is answered as a file.
        Discriminator(lambda value: str(source_tag(value) or "jsonl")),
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
