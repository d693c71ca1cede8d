"""Keys that several merge methods use: their types, bounds and meaning. A key of one method stands in its own file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, WithJsonSchema

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.fields import Seed, Weight


def _no_factors(space: str, info: ValidationInfo) -> str:
    if space == "factors":
        known = " and ".join(name for name, method in builtins.METHODS.items() if method.keys.factors)
        raise ValueError(f"found factors for method {info.data.get('method')}; expected it only for {known}")
    return space


Alpha = Annotated[float, Field(ge=0, le=1, description="Weight of the fine-tuned side; the safety side has 1 − alpha.")]
Density = Annotated[float, Field(gt=0, le=1, description="The part of each delta's elements that stays (TIES, DARE).")]
Lambda = Annotated[Weight, Field(alias="lambda", description="Factor of the merged delta (TIES).")]
Normalize = Annotated[
    bool, Field(description="Whether the sum is divided by the weights that agree (`ties`, `dare_ties`: default true).")
]
Rescale = Annotated[
    Literal["density", "l1"],
    Field(description="What makes up for dropped elements: 1/density (the paper's) or the L1 norm (mergekit's)."),
]
DrawSeed = Annotated[Seed, Field(description="Seed of the random choice (DARE).")]
Gamma = Annotated[
    Weight,
    Field(description="Factor of the safety vector V, or of its leading part (`add_safety_vector`, `svd_k`)."),
]
_SPACE = """What the method sees: the deltas; the weights W_finetuned and W_safety, as mergekit would; or
(adapters, `linear` and `dare_linear`) the factors A and B one by one, as PEFT does."""
AnySpace = Annotated[Literal["delta", "weights", "factors"], Field(description=_SPACE)]
"""For methods that know `factors`; their keys say so."""
Space = Annotated[
    AnySpace, AfterValidator(_no_factors), WithJsonSchema({"enum": ["delta", "weights"], "type": "string"})
]
"""For those that do not."""
