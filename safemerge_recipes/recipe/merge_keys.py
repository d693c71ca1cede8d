"""Keys that several merge methods use: their types, bounds and meaning. A key of one method stands in its own file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.fields import Seed, Strict, Weight


def _no_factors(space: str, info: ValidationInfo) -> str:
    if space == "factors":
        known = " and ".join(name for name, method in builtins.METHODS.items() if method.keys.factors)
        raise ValueError(f"found factors for method {info.data.get('method')}; expected it only for {known}")
    return space


class Gradient(Strict):
    """A number that changes over the depth of the model: values spread evenly from the first block to the last,
    straight lines between them."""

    gradient: Annotated[tuple[float, ...], Field(strict=False, min_length=2, max_length=10_000)]
    """The values."""

    def at(self, block: int, blocks: int) -> float:
        """The value for a block of so many.

        Raises:
            ValueError: there are more values than blocks.
        """
        if len(self.gradient) > blocks:
            count = len(self.gradient)
            raise ValueError(f"found a gradient of {count} values for {blocks} blocks; expected no more than blocks")
        place = block * (len(self.gradient) - 1) / max(blocks - 1, 1)
        first = min(int(place), len(self.gradient) - 2)
        share = place - first
        return (1 - share) * self.gradient[first] + share * self.gradient[first + 1]


def _or_gradient(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
    """A number, or a gradient of such numbers; `Merge.at` makes numbers of gradients before any work is planned."""
    if isinstance(value, Gradient):
        return value
    if not isinstance(value, Mapping):
        return number(value)
    given = value.get("gradient")
    if set(value) != {"gradient"} or not isinstance(given, list | tuple) or len(given) < 2:
        raise ValueError("found a mapping; expected a number, or `gradient` with a list of at least two")
    return Gradient(gradient=tuple(number(one) for one in given))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Gradient) else value


_PLAIN = PlainSerializer(_plain, return_type=Any)


def _schema(low: float, high: float) -> WithJsonSchema:
    number = {"type": "number", "minimum": low, "maximum": high}
    values = {"type": "array", "items": number, "minItems": 2}
    gradient = {"type": "object", "properties": {"gradient": values}, "required": ["gradient"]}
    return WithJsonSchema({"anyOf": [number, {**gradient, "additionalProperties": False}]})


Alpha = Annotated[
    float,
    Field(
        ge=0, le=1, description="Weight of the fine-tuned side; the safety side has 1 − alpha. "
        "`{gradient: [0.2, 0.8, 0.5]}` changes it over the depth of the model.",
    ),
    WrapValidator(_or_gradient),
    _PLAIN,
    _schema(0, 1),
]  # fmt: skip
Share = Annotated[float, Field(ge=-100, le=100), WrapValidator(_or_gradient), _PLAIN, _schema(-100, 100)]
Weights = Annotated[dict[str, Share], Field(min_length=1, max_length=100)]
"""What each delta weighs, by its role or name."""
SumNormalize = Annotated[
    bool | None,
    Field(description="Whether the sum is divided by the sum of the weights (`linear` and the like: default false)."),
]
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

COMMON = {
    "alpha": Alpha, "density": Density, "lambda_": Lambda, "rescale": Rescale, "seed": DrawSeed, "gamma": Gamma,
    "space": AnySpace,
}  # fmt: skip
"""The keys that are the same to every method that uses them, at their most general."""
