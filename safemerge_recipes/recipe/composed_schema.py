"""The schema of a recipe with what composing takes away before the recipe is checked: `extends`, `${name}`, `x-…`."""

from __future__ import annotations

from typing import Any

PLACEHOLDER = {"$ref": "#/$defs/Placeholder"}
"""What the schema allows in the place of a value: `${name}`."""
_PLACEHOLDER = {
    "type": "string",
    "pattern": r"^\$\{[A-Za-z_][A-Za-z0-9_-]{0,60}\}$",
    "description": "The value of a parameter.",
}
_SAID = ("description", "default", "title")


def add_to_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a recipe with what composing takes away before the recipe is checked."""
    value = {"type": ["number", "string", "boolean", "null"]}
    full = {
        "type": "object",
        "properties": {"default": value, "description": {"type": "string"}},
        "additionalProperties": False,
    }
    added = {
        "extends": {"type": "string", "description": "A recipe that this one changes, relative to this file."},
        "parameters": {
            "type": "object",
            "description": "Values used as `${name}` and set by `--set name=VALUE`.",
            "additionalProperties": {"anyOf": [value, full]},
        },
    }
    needed = schema.get("required", [])
    rest = {key: part for key, part in schema.items() if key != "required"}
    parts = {name: _with_placeholders(part) for name, part in schema["$defs"].items()}
    return rest | {
        "$defs": parts | {"Placeholder": _PLACEHOLDER},
        "properties": {**_with_placeholders(schema)["properties"], **added},
        "patternProperties": {"^x-": {}},
        "anyOf": [{"required": ["extends"]}, {"required": needed}],
    }


def _with_placeholders(part: dict[str, Any]) -> dict[str, Any]:
    """A mapping's schema in which `${name}` may stand for every value but a method, which tells forms apart."""
    if "anyOf" in part and "properties" not in part:
        return part | {"anyOf": [_with_placeholders(one) for one in part["anyOf"]]}
    given = part.get("properties")
    if given is None:
        return part
    return part | {"properties": {key: one if key == "method" else _fillable(one) for key, one in given.items()}}


def _fillable(one: dict[str, Any]) -> dict[str, Any]:
    """A value's schema, or `${name}` where it would refuse that text."""
    options = one.get("anyOf", [one])
    kinds = [option for option in options if option.get("type") in ("number", "integer", "boolean", "string")]
    if not kinds or any(
        option["type"] == "string" and not {"const", "enum", "pattern"} & option.keys() for option in kinds
    ):
        return one
    said = {key: one[key] for key in _SAID if key in one}
    bare = [{key: part for key, part in option.items() if key not in _SAID} for option in options]
    return {"anyOf": [*bare, PLACEHOLDER], **said}
