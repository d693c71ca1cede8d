"""The recipe reference and JSON schema, made from the model by `python -m safemerge_recipes.recipe.reference`.

Holds only how they are laid out; every sentence about a key is the docstring of its field.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe import model as recipe
from safemerge_recipes.recipe.composed_schema import PLACEHOLDER
from safemerge_recipes.recipe.fields import models_in
from safemerge_recipes.recipe.merge import method_parameters
from safemerge_recipes.recipe.merge_change import MergeChange, any_change
from safemerge_recipes.recipe.model import json_schema
from safemerge_recipes.storage.files import write_file

BEFORE: tuple[tuple[str, type[BaseModel]], ...] = (
    ("the recipe", recipe.Recipe),
    ("sources", recipe.Sources),
    ("a source", recipe.Source),
    ("gate", recipe.Gate),
    ("gate.random", recipe.Random),
)
AFTER: tuple[tuple[str, type[BaseModel]], ...] = (
    ("rules", recipe.Rule),
    ("output", recipe.Output),
    ("evaluate", recipe.Evaluate),
    ("evaluate.judge", recipe.Judge),
)


def sections() -> list[tuple[str, type[BaseModel]]]:
    """The parts of a recipe by title, in the order of the reference."""
    change = any_change()
    keys = [(field.alias or name, field.annotation) for name, field in change.model_fields.items()]
    parts = [(f"merge.{key}", part) for key, kind in keys for part in models_in(kind)]
    return [*BEFORE, ("merge", change), *sorted(parts, key=lambda part: part[0]), *AFTER]


INTRODUCTION = """\
# Recipe reference

A recipe is a YAML file. Unknown keys, repeated keys and values out of bounds are errors, all listed at once
with their lines. Only `true` and `false` are booleans. Relative paths are relative to the recipe file.

```yaml
sources:
  base: meta-llama/Llama-2-7b-hf
  aligned: meta-llama/Llama-2-7b-chat-hf
  finetuned: {adapter: my-org/llama2-gsm8k-lora}
  safety: {adapter: ./safety-lora}
gate: {metric: rho, tau: 0.35}
merge: {method: linear, alpha: 0.8}
output: {path: out/llama-2-7b-gsm8k-safe}
```

Δf = W_finetuned − W_aligned, Δs = W_safety − W_aligned, V = W_aligned − W_base.

`--set KEY=VALUE` changes a value: `--set gate.tau=0.6`, `--set rules.0.gate.lowest=4`. A selector set this
way takes the place of the one in the file, and another `merge.method` drops the file's keys that it does
not use.

Patterns match whole tensor names. Globs know `*` (any run, dots too), `?`, `[abc]`, `[!abc]`, `{a,b}` and
`{0..3}`; text between slashes is a regular expression in RE2's syntax, without look-around and
back-references: `/.*\\.(q|k)_proj\\.weight/`. In YAML, text that starts with `*` needs quotes.
"""


def reference() -> str:
    """The recipe reference, as Markdown."""
    definitions = json_schema()["$defs"]
    parts = [INTRODUCTION]
    for title, model in sections():
        schema = json_schema() if model is recipe.Recipe else definitions[model.__name__]
        schema = schema["anyOf"][-1] if model is recipe.Source else schema
        heading = title if title.startswith(("the ", "a ")) else f"`{title}`"
        parts.append(f"\n## {heading[0].upper()}{heading[1:]}\n\n{_heading(model)}\n\n")
        parts.append("| key | value | default | meaning |\n|---|---|---|---|\n")
        for name, field in schema["properties"].items():
            required = name in schema.get("required", ())
            meaning = " ".join(field.get("description", "").split())
            cells = (f"`{name}`", _kind(field), "needed" if required else _default(field), meaning)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
        if model is recipe.Gate:
            parts.append(f"\nExactly one of {', '.join(f'`{name}`' for name in recipe.SELECTORS)} is given.\n")
        if issubclass(model, MergeChange):
            parts.append("\nEach method takes its own keys and no others.\n\n")
            parts.append("| method | a selected tensor's Δ | keys it uses | sources it needs |\n|---|---|---|---|\n")
            for method, row in builtins.METHODS.items():
                name = f"[`{method}`]({row.link})" if row.link else f"`{method}`"
                parts.append(
                    f"| {name} | {row.formula} | {_listed(method_parameters(method))} | {_listed(row.needs)} |\n"
                )
            general = _listed(method_parameters("mergekit:"))
            parts.append(f"| `mergekit:<name>` | mergekit's, on the full weights | {general} | `safety` |\n")
            parts.append(f"| a plugin's | its own | {general} | its own |\n")
    return "".join([*parts, ACROSS])


ACROSS = """
## Several recipes, and one with gaps

`extends: ./base.yaml` puts a recipe over another: mappings are joined, everything else is replaced; a selector takes
the place of the other's, another `merge.method` that of all its keys, a source that of the whole source. Relative
paths start from the file they stand in. At most 8 recipes extend one another.

`parameters` names values that stand in the text as `${name}` (within `{…}` in quotes) and are set by
`--set name=VALUE`; alone such a text is the value itself, a number stays one. `$${` is the text `${`.

```yaml
extends: ./base.yaml
parameters:
  tau: {default: 0.35, description: where to cut}
  who: me
gate:
  tau: ${tau}
output:
  path: out/${who}-${tau}
```

Keys that start with `x-` are free, such as for anchors. `safemerge validate --show` prints the recipe as it stands
alone. `--source ROLE=PLACE` (every verb that plans) names another folder or hub id for a role, whose kind stays.
"""


def _heading(model: type[BaseModel]) -> str:
    """What a part of a recipe is, in a sentence or two."""
    if issubclass(model, MergeChange):
        return f"{recipe.Merge.__doc__} `method` says how."
    return " ".join((model.__doc__ or "").split())


def schema_text() -> str:
    """The JSON schema of a recipe, as stored in `docs/safemerge-recipe.schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "—"


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "—" if value is None or value == [] or value == {} else f"`{json.dumps(value)}`"


def _kind(field: dict[str, Any]) -> str:
    """The values a field takes, in short."""
    if "anyOf" in field:
        said = (one for one in field["anyOf"] if one.get("type") != "null" and one != PLACEHOLDER)  # everywhere
        kinds = dict.fromkeys(_kind(option) for option in said)
        return " or ".join(kinds)
    if "$ref" in field:
        return "mapping" if not field["$ref"].endswith("/Source") else "text or mapping"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    kind = {
        "string": "text", "integer": "integer", "number": "number", "boolean": "`true`, `false`",
        "array": "list", "object": "mapping",
    }[field["type"]]  # fmt: skip
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if key in field and abs(field[key]) < 1e5
    ]
    return " ".join([kind, ", ".join(bounds)]).rstrip()


def main(folder: str = "docs") -> None:
    """Writes both files into a folder."""
    write_file(Path(folder, "recipe.md"), reference())
    write_file(Path(folder, "safemerge-recipe.schema.json"), schema_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
