"""The merge of a recipe: what a selected tensor becomes. One class for each method, with exactly the keys it uses.

`merge:` is a union told apart by `method`; `Merge` reads it. Methods of mergekit and of plugins share a general form.
What a method computes is its file in `methods/`, where it comes from its row in `builtins`.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.fields import Options, Seed, Strict, Text, Weight, again, check_known

FACTOR_METHODS = ("linear", "dare_linear")
"""Built-in methods that know `space: factors`."""
NULLABLE = ("dare", "mask", "normalize")
"""Keys that may be written as null, which says nothing."""


# Keys that several methods use


def _no_factors(space: str, info: ValidationInfo) -> str:
    if space == "factors":
        known = " and ".join(FACTOR_METHODS)
        raise ValueError(f"found factors for method {info.data.get('method')}; expected it only for {known}")
    return space


def _check_normalization(value: object) -> object:
    import re

    if not isinstance(value, str) or not re.fullmatch(r"frobenius|spectral|rank:[1-9][0-9]{0,4}", value):
        found = f'"{value[:40]}"' if isinstance(value, str) else str(value).lower()[:40]
        raise ValueError(f"found {found}; expected frobenius, spectral or rank:k for method project")
    return value


def _known_method(name: str, info: ValidationInfo) -> str:
    if ":" in name and not name.startswith("mergekit:"):
        raise ValueError(f'found "{name}"; expected mergekit:<method> where there is a colon')
    return name if ":" in name else check_known("method", name, builtins.METHODS, info)


MethodName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}(:[A-Za-z0-9_.-]{1,100})?$"),
    AfterValidator(_known_method),
]
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
Space = Annotated[
    AnySpace, AfterValidator(_no_factors), WithJsonSchema({"enum": ["delta", "weights"], "type": "string"})
]


class Dare(Strict):
    """DARE for `add_safety_vector`: elements dropped at random, the rest divided by `density`."""

    on: Literal["vector", "delta"] = "vector"
    """What is thinned out: the safety vector V, or the fine-tuned delta Δf."""
    density: float = Field(default=0.5, gt=0, le=1)
    """The part of the elements that stays."""
    seed: Seed = 0
    """Seed of the choice."""


class MaskFile(Strict):
    """A mask or score of every element, made elsewhere."""

    path: Text
    """A safetensors file with a tensor of the same name and shape for every merged tensor."""
    threshold: float | None = None
    """Elements with a value above it are replaced. null: the file holds 0 (keep) to 1 (replace); values in
    between mix."""
    invert: bool = False
    """Replace the other elements instead."""
    fill: Literal["safety", "aligned", "zero"] = "safety"
    """What replaced elements become: the safety or the aligned weight, or 0."""


# The union


class Merge(Strict):
    """What a selected tensor becomes."""

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
        if "normalize" in cls.model_fields:  # its default differs between methods, so it is always told
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
        if error["type"] == "extra_forbidden" and len(place) == 1 and place[0] in _NAMES.values():
            used = _keys(cls)
            known = f"it uses: {', '.join(used)}" if used else "it uses no other key"
            message = f"{place[0]} is not used by method {method}; {known}"
        elif error["type"] == "missing" and place == ("mask",):
            message = f"missing; expected a mapping with `path` for method {method}"
        if not message:
            return again(error, place)
        kind = PydanticCustomError("recipe", "{message}", {"message": message})
        return InitErrorDetails(type=kind, loc=place, input=error["input"])

    def parameters(self) -> dict[str, Any]:
        """The values of the keys that the method uses, by the name users write."""
        names = {field.alias or name: name for name, field in type(self).model_fields.items() if name != "method"}
        return {key: getattr(self, name) for key, name in names.items()}


def _keys(form: type[Merge]) -> tuple[str, ...]:
    """The keys beside `method`, by the name users write."""
    return tuple(key for key in form.key_names() if key != "method")


class Linear(Merge):
    """αΔf + (1−α)Δs."""

    method: Literal["linear"] = "linear"
    alpha: Alpha = 0.8
    space: AnySpace = "delta"


class Slerp(Merge):
    """Spherical interpolation."""

    method: Literal["slerp"]
    alpha: Alpha = 0.8
    space: Space = "delta"


class Ties(Merge):
    """The largest elements of each side, where their signs agree."""

    method: Literal["ties"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    lambda_: Lambda = 1.0
    normalize: Normalize = True
    space: Space = "delta"


class DareLinear(Merge):
    """Random elements of each side, then their weighted sum."""

    method: Literal["dare_linear"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    rescale: Rescale = "density"
    seed: DrawSeed = 0
    space: AnySpace = "delta"

    @field_validator("space")
    @classmethod
    def _as_peft(cls, space: str, info: ValidationInfo) -> str:
        if space == "factors" and info.data.get("rescale") == "l1":
            raise ValueError("found factors with rescale l1; expected rescale density, as PEFT does")
        return space


class DareTies(Merge):
    """Random elements of each side, where their signs agree."""

    method: Literal["dare_ties"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    lambda_: Lambda = 1.0
    normalize: Normalize = True
    rescale: Rescale = "density"
    seed: DrawSeed = 0
    space: Space = "delta"


class TaskArithmetic(Merge):
    """A sum with factors of one's own."""

    method: Literal["task_arithmetic"]
    lambda_finetuned: Weight = 1.0
    """Factor of Δf (`task_arithmetic`)."""
    lambda_safety: Weight = 1.0
    """Factor of Δs (`task_arithmetic`)."""
    space: Space = "delta"


class Project(Merge):
    """The part of Δf inside what alignment changed."""

    method: Literal["project"]
    normalize: Annotated[
        str, BeforeValidator(_check_normalization), Field(pattern=r"^(frobenius|spectral|rank:[1-9][0-9]{0,4})$")
    ] = "frobenius"
    """What VVᵀ is divided by (`project`): `frobenius`, C = VVᵀ/‖V‖_F (default, the published form; its effect depends
    on the scale of V), `spectral`, C = VVᵀ/‖VVᵀ‖₂ (nothing grows, whatever the scale), or `rank:k`, the orthogonal
    projection on the k leading left directions of V."""


class AddSafetyVector(Merge):
    """Δf and the safety vector."""

    method: Literal["add_safety_vector"]
    gamma: Gamma = 1.0
    dare: Dare | None = None
    """Thin out V or Δf at random before they are added (`add_safety_vector`)."""


class SvdK(Merge):
    """Δf and the leading part of the safety vector."""

    method: Literal["svd_k"]
    gamma: Gamma = 1.0
    rank: int = Field(default=16, ge=1, le=65536)
    """How many leading singular directions of V are added (`svd_k`: Δf + gamma · V_rank)."""


class Mask(Merge):
    """Elements named by a file are replaced."""

    method: Literal["mask"]
    mask: MaskFile
    """The elements to replace (`mask`)."""


class Replace(Merge):
    """Δs in place of Δf."""

    method: Literal["replace"]


class Drop(Merge):
    """No Δ: the aligned weight."""

    method: Literal["drop"]


class Custom(Merge):
    """A method of mergekit, `mergekit:<name>`, or of a plugin: its own parameters are `options`."""

    method: MethodName
    alpha: Alpha = 0.8
    seed: DrawSeed = 0
    space: AnySpace = "delta"
    options: Options = Field(default={})
    """Parameters of `mergekit:*` and of a plugin's method, by name."""


def _method_of(form: type[Merge]) -> str:
    """The name in a form's `method: Literal[…]`."""
    return str(form.model_fields["method"].annotation.__args__[0])  # type: ignore[union-attr]


FORMS: Mapping[str, type[Merge]] = {_method_of(form): form for form in Merge.__subclasses__() if form is not Custom}
"""The form of each built-in method."""


def form_of(method: object) -> type[Merge]:
    """The class that holds a method's keys."""
    return FORMS.get(method, Custom) if isinstance(method, str) else Custom


def method_parameters(method: str) -> tuple[str, ...]:
    """The keys of `merge` that a method uses."""
    return _keys(form_of(method))


# Rules


_ALL: tuple[type[Merge], ...] = (*FORMS.values(), Custom)


def _key(name: str) -> tuple[Any, Any]:
    """A key as any of the methods that use it takes it, for a rule that need not say which of them."""
    infos = [form.model_fields[name] for form in _ALL if name in form.model_fields]
    kinds: dict[str, Any] = {}
    for info in infos:  # of the same type the first, which is the most general
        kinds.setdefault(repr(info.annotation), getitem(Annotated, (info.annotation, *info.metadata, Field())))
    if name in NULLABLE:
        kinds["None"] = None
    meanings = " ".join(dict.fromkeys(info.description or "" for info in infos))
    defaults = [None if info.is_required() else info.default for info in infos]  # told in the reference alone
    default = defaults[0] if all(one == defaults[0] for one in defaults) else None
    return getitem(Union, tuple(kinds.values())), Field(default=default, alias=infos[0].alias, description=meanings)


_NAMES = {name: field.alias or name for form in _ALL for name, field in form.model_fields.items() if name != "method"}
_METHOD = Field(default="linear", description="The merge method: one of those below, `mergekit:<name>`, or a plugin's.")
_FIELDS: dict[str, Any] = {"method": (MethodName, _METHOD)} | {name: _key(name) for name in _NAMES}
_Keys: Any = create_model("_Keys", __base__=Strict, **_FIELDS)


class MergeChange(_Keys):
    """The parts of the merge that a rule changes. Another method forgets keys that it does not use."""


def change_merge(merge: Merge, change: MergeChange | None) -> Merge:
    """The merge with a rule's changes; another method forgets what it does not use."""
    if change is None:
        return merge
    values = merge.given()
    given = change.given()
    method = given.get("method", merge.method)
    if method != merge.method:
        # `normalize` and `options` mean something else to each method.
        used = [key for key in method_parameters(method) if key not in ("normalize", "options")]
        values = {key: value for key, value in values.items() if key in used}
        if values.get("space") == "factors" and method not in FACTOR_METHODS:
            del values["space"]
    return Merge.model_validate({**values, **given})


def merge_sources(merge: Merge) -> tuple[Role, ...]:
    """The roles a merge needs besides `aligned` and `finetuned`. Nothing is known of plugins."""
    if isinstance(merge, Mask):
        return ("safety",) if merge.mask.fill == "safety" else ()
    if merge.method.startswith("mergekit:"):
        return ("safety",)
    row = builtins.METHODS.get(merge.method)
    return row.needs if row else ()
