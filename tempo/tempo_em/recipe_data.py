"""`data` of a recipe: where questions come from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from tempo_em.recipe_base import NoiseRate, Positive, SetName, Strict
from tempo_em.recipe_generated import GENERATORS, GeneratedSource, one_of
from tempo_em.recipe_verifier import VerifierRecipe


class JsonlSource(Strict):
    """A JSONL file: one object a line."""

    jsonl: Path
    prompt: str = Field(default="prompt", description="column with the prompt: text or chat messages")
    answer: str | None = Field(default="answer", description="column with the answer, or null when there is none")
    extract: Literal["boxed", "answer_line", "whole"] = Field(
        default="boxed", description="where a response states its answer"
    )
    verifier: VerifierRecipe = Field(default=VerifierRecipe(), description="who says whether a response is right")
    limit: Positive | None = Field(default=None, description="read at most this many questions")

    @property
    def has_no_answers(self) -> bool:
        return self.answer is None and self.verifier.compares_answers


def _source_tag(value: Any) -> str:
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "jsonl" if "jsonl" in fields else str(fields.get("generator", "jsonl"))


if TYPE_CHECKING:
    Source = GeneratedSource | JsonlSource
else:
    Source = Annotated[
        one_of(GENERATORS) | Annotated[JsonlSource, Tag("jsonl")],
        Discriminator(_source_tag),
    ]


class DataRecipe(Strict):
    """Three kinds of prompts. Answers of `unlabelled`, where they exist, are used for audit metrics only."""

    labelled: Source
    unlabelled: Source
    evaluation: dict[SetName, Source] = Field(
        default={}, description="further sets by name, for example labelled_heldout"
    )
    label_noise: NoiseRate = Field(
        default=0.0, description="an experiment: so many labelled questions have their training verdicts turned round"
    )

    @model_validator(mode="after")
    def names(self) -> "DataRecipe":
        if "unlabelled" in self.evaluation:
            raise ValueError("evaluation.unlabelled is reserved for the audit of data.unlabelled; choose another name")
        return self
