"""`verifier` of a source of rows in a recipe: who says whether a response is right."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tempo_em.recipe_base import Count, Positive, Strict

Seconds = Annotated[float, Field(gt=0)]


class JudgeRecipe(Strict):
    """A language model behind an OpenAI-compatible endpoint."""

    url: str = Field(pattern=r"^https?://\S+$", description="up to and with /v1")
    model: str = Field(min_length=1)
    api_key_env: str | None = Field(default=None, description="environment variable that holds the key")
    prompt: str | None = Field(
        default=None, description="what to judge, with {response}, and if wanted {question} and {reference}"
    )
    concurrency: Positive = Field(default=16, description="requests at a time of each rank")
    timeout_s: Seconds = 120.0
    retries: Count = Field(default=4, description="after no connection, 429 and 5xx")
    max_tokens: Positive = Field(default=1024, description="of the judge's answer, whose last line is its verdict")

    @model_validator(mode="after")
    def sees_the_response(self) -> "JudgeRecipe":
        if self.prompt is not None and "{response}" not in self.prompt:
            raise ValueError("prompt lacks {response}, so the judge would not see what it judges")
        return self


class VerifierRecipe(Strict):
    """A kind of answer, as a plain word (`verifier: int`), a function of yours, or a judge."""

    type: Literal["exact", "int", "expression", "choice", "grid", "text"] | None = Field(
        default=None, description="a kind of answer; exact, if nothing is said"
    )
    function: str | None = Field(
        default=None, description="module:function with the signature of TRL's or verl's reward functions"
    )
    timeout_s: Seconds = Field(default=60.0, description="for one call of the function")
    judge: JudgeRecipe | None = None

    @property
    def compares_answers(self) -> bool:
        """Functions and judges may do without right answers."""
        return self.function is None and self.judge is None

    @model_validator(mode="before")
    @classmethod
    def word(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def one_of_them(self) -> "VerifierRecipe":
        given = [name for name in ("type", "function", "judge") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot both say what is right; leave one of them out")
        return self
