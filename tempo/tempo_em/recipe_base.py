"""What every part of a recipe is made of: strict models, and numbers within bounds."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
NoiseRate = Annotated[float, Field(ge=0, lt=0.5)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
