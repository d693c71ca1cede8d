"""`--set KEY=VALUE`: changes a value of a recipe file before it is checked."""

from __future__ import annotations

from typing import Any

from safemerge_recipes.recipe.gate import SELECTORS
from safemerge_recipes.recipe.merge import all_keys, method_parameters
from safemerge_recipes.recipe.merge_forms import displaced
from safemerge_recipes.recipe.messages import Reader, child, dotted
from safemerge_recipes.recipe.yaml_text import Keys, YamlError, describe, read_yaml


def override(reader: Reader, text: str) -> None:
    """Applies one `KEY=VALUE`, or notes why not."""
    key, equals, value_text = text.partition("=")
    shown = text if len(text) <= 80 else text[:77] + "..."

    def refuse(message: str) -> None:
        reader.problems.append((10**9, f"--set {shown}", message))

    parts = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
    if not equals or "" in parts:
        return refuse("not an override; expected KEY=VALUE, such as gate.tau=0.6")
    try:
        document = read_yaml(value_text)
    except YamlError as error:
        return refuse(str(error))
    for _, keys, message in document.problems:
        refuse(f"{dotted((*parts, *keys))}: {message}")

    owner = reader.document.value
    for depth, part in enumerate(parts[:-1]):
        inner = child(owner, part)
        if isinstance(inner, str) and parts[0] == "sources" and depth == (2 if parts[1] == "others" else 1):
            inner = owner[part] = {"location": inner}
        elif inner is None and isinstance(owner, dict) and not isinstance(parts[depth + 1], int):
            inner = owner[part] = {}
        if not isinstance(inner, (dict, list)):
            above = dotted(parts[: depth + 1])
            return refuse(f"there is no {above} that could hold it" if inner is None else
                          f"{above} is {describe(inner)}; expected a mapping")  # fmt: skip
        owner = inner
    last = parts[-1]
    if isinstance(owner, list):
        if not isinstance(last, int) or last >= len(owner):
            return refuse(f"{dotted(parts[:-1])} is a list of {len(owner)}; expected a position from 0")
    else:
        last = str(last)
        _make_room(reader, owner, parts, document.value)
    owner[last] = document.value
    keys = (*parts[:-1], last)
    for known in [known for known in reader.origins if known[: len(keys)] == keys]:
        del reader.origins[known]
    reader.origins[keys] = shown
    return None


def _make_room(reader: Reader, owner: dict[str, Any], parts: Keys, value: object) -> None:
    """Removes what an override takes the place of: the gate's other selectors, other methods' keys."""
    for depth in range(1, len(parts)):
        holder, key = parts[depth - 1], parts[depth]
        if holder == "merge":
            merge = reader.document.value
            for part in parts[:depth]:
                merge = child(merge, part)
            for name in displaced((key,)) if isinstance(merge, dict) else ():
                if (*parts[:depth], name) not in reader.origins:
                    merge.pop(name, None)
        if holder not in ("gate", "complement") or key not in SELECTORS:
            continue
        gate = reader.document.value
        for part in parts[:depth]:
            gate = child(gate, part)
        if isinstance(gate, dict):
            stale = [name for name in SELECTORS if name != key and name in gate]
            stale += ["per"] * (key not in ("lowest", "fraction") and "per" in gate)
            for name in stale:
                if (*parts[:depth], name) not in reader.origins:
                    del gate[name]
    if parts[-2:] == ("merge", "method") and isinstance(value, str) and owner.get("method") != value:
        keep = {key for key in method_parameters(value) if key not in ("normalize", "options")}
        for name in [name for name in owner if name not in keep and name in ("method", *all_keys())]:
            if (*parts[:-1], name) not in reader.origins:
                del owner[name]
