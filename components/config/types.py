"""The value types that sections share: a bound is part of a key's type, so that one place states it, checks it and
prints it."""

from typing import Annotated, Literal

from pydantic import Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
AllOrPositive = Literal[-1] | PositiveInt  # -1 means "all" or "derive it"
LatestOrStep = Literal[-1] | NonNegativeInt  # step 0 is a seed checkpoint
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what a generator of torch takes
Seconds = Annotated[int, Field(ge=1, le=365 * 24 * 3600)]  # the clocks of gloo overflow beyond some hundred years
NonEmpty = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
PositiveOrInf = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Dtype = Literal["bfloat16", "float32"]
