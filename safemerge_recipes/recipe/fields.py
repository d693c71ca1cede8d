"""What the parts of a recipe are made of: strict frozen values, bounded texts and numbers, problems and places."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError

from safemerge_recipes.recipe.meanings import field_docstrings
from safemerge_recipes.recipe.patterns import compile_patterns

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaValue

SIZE_UNITS: Mapping[str, int] = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
"""Bytes by unit, in capitals."""


def check_text(text: str) -> str:
    """Refuses control characters."""
    bad = next((char for char in text if not char.isprintable() and char not in "\n\t"), None)
    if bad is not None and (ord(bad) < 32 or 127 <= ord(bad) < 160):
        raise ValueError(f"found the control character {bad!r}; expected printable text")
    return text


def as_tuple(value: object) -> object:
    """One text as a list of it."""
    return (value,) if isinstance(value, str) else value


def _check_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    compile_patterns(patterns)
    return patterns


def parse_size(value: object) -> object:
    """The bytes of a size such as `5GB` (5·10⁹) or `2GiB` (2·2³⁰). What is not text is returned as it is.

    Raises:
        ValueError: the text is not a number with a known unit.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", value)
    if not match or match[2].upper() not in SIZE_UNITS:
        raise ValueError(f'found "{value[:40]}"; expected bytes, or a number with KB, MB, GB, KiB, MiB or GiB')
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def _check_options(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    def check(value: object) -> None:
        if isinstance(value, str):
            check_text(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"found {value}; expected a finite number")
        elif isinstance(value, dict):
            for key, part in value.items():
                check(key)
                check(part)
        elif isinstance(value, list):
            for part in value:
                check(part)

    check(options)
    return options


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_text)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=10_000_000)]
Options = Annotated[dict[str, JsonValue], Field(max_length=100), AfterValidator(_check_options)]
Weight = Annotated[float, Field(ge=-100, le=100)]
Patterns = Annotated[
    tuple[Text, ...],
    Field(strict=False, min_length=1, max_length=10_000),
    BeforeValidator(as_tuple),
    AfterValidator(_check_patterns),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Size = Annotated[
    int,
    Field(ge=1, le=2**60),
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
]


class Strict(BaseModel):
    """A frozen part of a recipe: unknown keys are refused, numbers are finite, docstrings document the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def key_names(cls) -> list[str]:
        """Its keys, as users write them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What each key means, by the name users write."""
        texts = field_docstrings(cls)
        named = {name: field.description or texts.get(name, "") for name, field in cls.model_fields.items()}
        return {cls.model_fields[name].alias or name: text for name, text in named.items() if text}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for key, meaning in cls.meanings().items():
            if key in properties:
                properties[key].setdefault("description", meaning)
        return found

    def given(self) -> dict[str, Any]:
        """The keys that were written, by the name users write, with their values."""
        fields = type(self).model_fields
        return {
            field.alias or name: getattr(self, name) for name, field in fields.items() if name in self.model_fields_set
        }


def models_in(annotation: Any) -> Iterator[type[Strict]]:
    """The models that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


@dataclass(slots=True)
class Problems:
    """Collects problems with their places, to be raised as one error."""

    found: list[InitErrorDetails]

    def add(self, place: Sequence[str | int], message: str, value: object = None) -> None:
        """Notes a problem in words."""
        error = PydanticCustomError("recipe", "{message}", {"message": message})
        self.found.append(InitErrorDetails(type=error, loc=tuple(place), input=value))

    def add_all(self, place: Sequence[str | int], errors: ValidationError) -> None:
        """Takes over what a part's own check found, with the part's place before it."""
        self.found += [again(error, (*place, *error["loc"])) for error in errors.errors(include_url=False)]

    def check(self, title: str) -> None:
        """Raises ValidationError if there are any."""
        if self.found:
            raise ValidationError.from_exception_data(title, self.found)


def again(error: ErrorDetails, place: Sequence[str | int]) -> InitErrorDetails:
    """An error that pydantic reported, to be raised once more from another place."""
    kind: Any = error["type"]
    if kind == "recipe":
        kind = PydanticCustomError("recipe", "{message}", error["ctx"])
    return InitErrorDetails(type=kind, loc=tuple(place), input=error["input"], ctx=error.get("ctx", {}))


def check_known(kind: str, name: str, builtin: Mapping[str, Any], info: ValidationInfo) -> str:
    """Refuses a name that is neither built in nor a plugin's, where the context tells what plugins offer."""
    plugins = (info.context or {}).get(f"{kind}s")
    if plugins is None or name in builtin or name in plugins:
        return name
    known = {known.lower(): known for known in (*builtin, *plugins)}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f'did you mean "{known[close[0]]}"?' if close else f"expected one of {', '.join(known.values())}"
    raise ValueError(f'found "{name}", an unknown {kind}; {hint}')


ONTO = "onto"
"""Another spelling of the key `on`, which readers of YAML 1.1 take for true."""


def read_onto(value: Any) -> Any:
    """The mapping with `onto` under its other name, `on`. Raises ValueError where both are given."""
    if not isinstance(value, dict) or ONTO not in value:
        return value
    if "on" in value:
        raise ValueError("found on and onto, which are the same; expected one of them")
    return {("on" if key == ONTO else key): part for key, part in value.items()}


def tell_onto(schema: dict[str, Any]) -> None:
    """Adds `onto` to the schema of a mapping that has `on`."""
    on = schema["properties"]["on"]
    schema["properties"][ONTO] = {**on, "description": "Another spelling of `on`, which YAML 1.1 reads as true."}
    schema["not"] = {"required": ["on", ONTO]}
