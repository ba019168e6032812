"""`verifier` of a question file in a recipe: who says whether a response is right."""

from typing import Any, Literal

from pydantic import model_validator

from tempo_em.recipe_base import Strict


class VerifierRecipe(Strict):
    """A kind of answer, as a plain word (`verifier: int`)."""

    type: Literal["exact", "int", "expression", "choice", "grid", "text"] = "exact"

    @model_validator(mode="before")
    @classmethod
    def word(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value
