"""The merge of a recipe: what a selected tensor becomes. `merge:` is a union told apart by `method`.

The keys of a built-in method stand with all else of it in its file in `methods/`, which is imported when a recipe
names the method; methods of mergekit and of plugins share a general form, `Custom`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.fields import Options, Strict, again, check_known
from safemerge_recipes.recipe.merge_keys import Alpha, AnySpace, DrawSeed, Gradient, Weights
from safemerge_recipes.recipe.numbers import Rational, exact

NULLABLE = ("dare", "mask", "normalize", "weights")
"""Keys that may be written as null, which says nothing."""


class Merge(Strict):
    """What a selected tensor becomes."""

    factors: ClassVar[bool] = False
    """Whether the method knows `space: factors`."""

    method: str
    """The merge method."""

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: ModelWrapValidatorHandler[Merge], info: ValidationInfo) -> Merge:
        if not isinstance(value, dict):
            return handler(value)
        if cls is Merge:
            return form_of(value.get("method", "linear")).model_validate(value, context=info.context)
        value = {key: part for key, part in value.items() if part is not None or key not in NULLABLE}
        if cls.model_fields.get("normalize") and cls.model_fields["normalize"].default is not None:
            # Its default differs between methods, so it is always told.
            value.setdefault("normalize", cls.model_fields["normalize"].default)
        try:
            return handler(value)
        except ValidationError as errors:
            told = [cls._told(error, value) for error in errors.errors(include_url=False)]
            raise ValidationError.from_exception_data("Merge", told) from None

    @classmethod
    def _told(cls, error: ErrorDetails, value: Mapping[str, Any]) -> InitErrorDetails:
        """An error of pydantic's, in terms of methods where it is about their keys."""
        place, method = error["loc"], value.get("method", "linear")
        message = ""
        if error["type"] == "extra_forbidden" and len(place) == 1 and place[0] in all_keys():
            used = cls.own_keys()
            known = f"it uses: {', '.join(used)}" if used else "it uses no other key"
            message = f"{place[0]} is not used by method {method}; {known}"
            if place == ("weights",):
                others = ", ".join(role for role in _names(value) if role not in builtins.ROLES)
                takes = ", ".join(name for name, form in forms().items() if name and issubclass(form, Weighted))
                message += f"; for {others or 'any number of deltas'} expected one of {takes}"
        elif error["type"] == "missing" and place == ("mask",):
            message = f"missing; expected a mapping with `path` for method {method}"
        if not message:
            return again(error, place)
        kind = PydanticCustomError("recipe", "{message}", {"message": message})
        return InitErrorDetails(type=kind, loc=place, input=error["input"])

    @classmethod
    def own_keys(cls) -> tuple[str, ...]:
        """The keys beside `method`, by the name users write."""
        return tuple(key for key in cls.key_names() if key != "method")

    def parameters(self) -> dict[str, Any]:
        """The values of the keys that the method uses, by the name users write."""
        names = {field.alias or name: name for name, field in type(self).model_fields.items() if name != "method"}
        return {key: getattr(self, name) for key, name in names.items()}

    def needs(self) -> tuple[Role, ...]:
        """The roles it needs besides `aligned` and `finetuned`. Nothing is known of plugins."""
        return tuple(builtins.METHODS[self.method].needs)

    def at(self, block: int | None, blocks: int) -> Merge:
        """The merge for a tensor of one of so many blocks, with numbers in the place of gradients.

        Raises:
            ValueError: the tensor is in no block, or there are more values than blocks.
        """
        found: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Gradient):
                found[name] = _at(value, block, blocks)
            elif isinstance(value, dict) and any(isinstance(one, Gradient) for one in value.values()):
                found[name] = {key: _at(one, block, blocks) for key, one in value.items()}
        return self.model_validate({**self.given(), **found}) if found else self

    @property
    def mask_files(self) -> tuple[str, ...]:
        """The score files that it reads, as the recipe writes them."""
        return ()


def _at(value: Any, block: int | None, blocks: int) -> Any:
    if not isinstance(value, Gradient):
        return value
    if block is None:
        raise ValueError("found a gradient for a tensor in no numbered block; expected a number there, by a rule")
    return value.at(block, blocks)


def _names(merge: Mapping[str, Any]) -> list[str]:
    weights = merge.get("weights")
    return [str(role) for role in weights] if isinstance(weights, Mapping) else []


class Weighted(Merge):
    """A merge of any number of deltas: `weights` by role and name, or a short form for two."""

    short: ClassVar[tuple[str, ...]] = ("alpha",)
    """The keys of the short form."""
    divides: ClassVar[bool] = False
    """Whether `normalize` divides by the sum of all weights."""

    weights: Weights | None = None
    """What each delta weighs, used as written: of `finetuned`, `safety` and names of `sources.others`. In the place of
    alpha, of `task_arithmetic`'s factors, or of a mask's fill; numbers may be gradients."""

    @model_validator(mode="after")
    def _check_weights(self) -> Weighted:
        both = [key for key in self.short if key in self.model_fields_set]
        if self.weights is not None and both:
            raise ValueError(f"found weights and {both[0]}; expected one of them")
        numbers = self._written()
        if getattr(self, "normalize", None) and not sum(numbers.values()) and not _varies(numbers):
            raise ValueError(
                "the weights sum to 0, by which normalize divides; expected another sum, or normalize: false"
            )
        return self

    def _pair(self) -> tuple[Any, Any]:
        """The weights of Δf and Δs in the short form."""
        alpha = getattr(self, "alpha", 1.0)
        return (alpha, alpha) if isinstance(alpha, Gradient) else (exact(alpha), 1 - exact(alpha))

    def _written(self) -> dict[Role, Any]:
        if self.weights is not None:
            return {role: one if isinstance(one, Gradient) else exact(one) for role, one in self.weights.items()}
        return dict(zip(("finetuned", "safety"), self._pair(), strict=True))

    def shares(self) -> dict[Role, Rational]:
        """What each delta weighs, by its role, exactly; for merges without gradients."""
        found = self._written()
        total = sum(found.values()) if self.divides and getattr(self, "normalize", None) else 1
        return {role: share if total == 1 else exact(share) / Fraction(total) for role, share in found.items()}

    def float_shares(self) -> dict[Role, float]:
        """`shares` as the nearest floats; of the short form as PEFT is given them, α and 1 − α."""
        if self.weights is None and hasattr(self, "alpha"):
            return {"finetuned": self.alpha, "safety": 1 - self.alpha}
        return {role: float(share) for role, share in self.shares().items()}

    def needs(self) -> tuple[Role, ...]:
        """Those that have a weight."""
        if self.weights is None:
            return super().needs()
        return tuple(role for role in self.weights if role != "finetuned")

    def parameters(self) -> dict[str, Any]:
        """Of `weights` and the short form the one that holds."""
        left_out = ("weights",) if self.weights is None else self.short
        return {key: value for key, value in super().parameters().items() if key not in left_out}


def _varies(weights: Mapping[Role, Any]) -> bool:
    return any(isinstance(one, Gradient) for one in weights.values())


def _known_method(name: str, info: ValidationInfo) -> str:
    if ":" in name and not name.startswith("mergekit:"):
        raise ValueError(f'found "{name}"; expected mergekit:<method> where there is a colon')
    return name if ":" in name else check_known("method", name, builtins.METHODS, info)


MethodName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}(:[A-Za-z0-9_.-]{1,100})?$"),
    AfterValidator(_known_method),
]


class Custom(Weighted):
    """A method of mergekit, `mergekit:<name>`, or of a plugin: its own parameters are `options`."""

    method: MethodName
    alpha: Alpha = 0.8
    seed: DrawSeed = 0
    space: AnySpace = "delta"
    options: Options = Field(default={})
    """Parameters of `mergekit:*` and of a plugin's method, by name."""

    def needs(self) -> tuple[Role, ...]:
        """Those that have a weight; without weights those of mergekit need a safety model."""
        if self.weights is not None:
            return super().needs()
        return ("safety",) if self.method.startswith("mergekit:") else ()


def form_of(method: object) -> type[Merge]:
    """The class that holds a method's keys."""
    return builtins.METHODS[method].keys if isinstance(method, str) and method in builtins.METHODS else Custom


def forms() -> dict[str, type[Merge]]:
    """The form of each built-in method, by its name; "" for all others."""
    return {name: method.keys for name, method in builtins.METHODS.items()} | {"": Custom}


def all_keys() -> tuple[str, ...]:
    """The keys that any method uses, beside `method`."""
    return tuple(dict.fromkeys(key for form in forms().values() for key in form.own_keys()))


def method_parameters(method: str) -> tuple[str, ...]:
    """The keys of `merge` that a method uses."""
    return form_of(method).own_keys()
