"""The merge of a recipe: what a selected tensor becomes. `merge:` is a union told apart by `method`.

The keys of a built-in method stand with all else of it in its file in `methods/`, which is imported when a recipe
names the method; methods of mergekit and of plugins share a general form, `Custom`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.fields import Options, Strict, again, check_known
from safemerge_recipes.recipe.merge_keys import Alpha, AnySpace, DrawSeed

NULLABLE = ("dare", "mask", "normalize")
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
        if error["type"] == "extra_forbidden" and len(place) == 1 and place[0] in all_keys():
            used = cls.own_keys()
            known = f"it uses: {', '.join(used)}" if used else "it uses no other key"
            message = f"{place[0]} is not used by method {method}; {known}"
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

    @property
    def mask_file(self) -> str | None:
        """The file of a mask that it reads, as the recipe writes it."""
        return None


def _known_method(name: str, info: ValidationInfo) -> str:
    if ":" in name and not name.startswith("mergekit:"):
        raise ValueError(f'found "{name}"; expected mergekit:<method> where there is a colon')
    return name if ":" in name else check_known("method", name, builtins.METHODS, info)


MethodName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}(:[A-Za-z0-9_.-]{1,100})?$"),
    AfterValidator(_known_method),
]


class Custom(Merge):
    """A method of mergekit, `mergekit:<name>`, or of a plugin: its own parameters are `options`."""

    method: MethodName
    alpha: Alpha = 0.8
    seed: DrawSeed = 0
    space: AnySpace = "delta"
    options: Options = Field(default={})
    """Parameters of `mergekit:*` and of a plugin's method, by name."""

    def needs(self) -> tuple[Role, ...]:
        """Those of mergekit need a safety model."""
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
