"""Controls of a recipe, as recipes: what would have happened with other tensors, as many of them.

A gate is worth something only against choices that know nothing: as many tensors at random, as many of each
module type at random, exactly the others, all, and none. Works from a plan, since the counts are the gate's.
"""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import WriteError
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.recipe.loading import LoadedRecipe, dump_recipe
from safemerge_recipes.recipe.model import SELECTORS, UNMEASURED_SELECTORS, Gate, Policy, Recipe
from safemerge_recipes.sources.masks import mask_path
from safemerge_recipes.tensor_names import module_type


def control_recipes(loaded: LoadedRecipe, plan: Plan, folder: Path, seeds: int) -> dict[str, str]:
    """File name -> text of every control of a planned recipe.

    Args:
        loaded: the recipe; its relative paths are rewritten to start at `folder`.
        plan: its plan; gives the counts.
        folder: where the controls will lie.
        seeds: how many random controls of each kind.
    """
    chosen = _chosen(plan)
    kinds: dict[str, tuple[str, Any]] = {}
    for seed in range(seeds):
        kinds[f"random-{seed}"] = (f"as many tensors at random, seed {seed}", lambda rule, gate, seed=seed: {
            "random": {"count": sum(chosen.get(rule, {}).values()), "seed": seed}
        })  # fmt: skip
    for seed in range(seeds):
        kinds[f"random-by-type-{seed}"] = (
            f"as many tensors of each module type at random, seed {seed}",
            lambda rule, gate, seed=seed: {
                "random": {"count": dict(sorted(chosen.get(rule, {}).items())) or 0, "seed": seed}
            },
        )
    kinds["complement"] = ("exactly the tensors that the gate does not choose", lambda rule, gate: _complement(gate))
    kinds["all"] = ("every gated tensor merged", lambda rule, gate: {"always": True})
    kinds["none"] = ("nothing merged", lambda rule, gate: {"never": True})
    texts = {}
    for suffix, (words, selector_of) in kinds.items():
        recipe = _control(loaded, folder, suffix, words, selector_of)
        texts[f"{loaded.path.stem}-{suffix}.yaml"] = f"# Control of {loaded.path.name}: {words}.\n{dump_recipe(recipe)}"
    return texts


def write_recipes(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Writes the controls; returns their paths. Raises WriteError when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{folder}: {error.strerror}; choose another --output") from None
    return [folder / name for name in texts]


def _chosen(plan: Plan) -> dict[int | None, Counter[str]]:
    """Rule (None: the recipe itself) -> module type -> how many tensors the gate chose."""
    found: dict[int | None, Counter[str]] = {}
    for tensor in plan.gated:
        if tensor.action == "merge" and tensor.policy is not None:
            found.setdefault(tensor.policy.rule, Counter())[module_type(tensor.name)] += 1
    return found


def _complement(gate: Gate) -> dict[str, Any]:
    key, value = gate.selector
    if key == "complement":  # the complement of a complement is what it is made of
        inner, what = value.selector
        return {inner: _plain(what), **({"per": value.per} if value.per else {})}
    return {"complement": {key: _plain(value), **({"per": gate.per} if gate.per else {})}}


def _plain(value: Any) -> Any:
    return value.model_dump(by_alias=True, exclude_none=True) if hasattr(value, "model_dump") else value


def _gate(policy: Policy, selector_of: Any) -> dict[str, Any]:
    """What a control changes in a gate. Gates that choose without the metric are no choice to be controlled."""
    gate = policy.gate
    if gate.selector[0] in UNMEASURED_SELECTORS - {"names", "names_file"}:
        return {}
    found: dict[str, Any] = selector_of(policy.rule, gate)
    if next(iter(found)) in ("random", "always", "never"):
        # Decided tensor by tensor, whatever the gate decided together, and also where its metric is undefined.
        found["granularity"] = "tensor"
    return found


def _control(loaded: LoadedRecipe, folder: Path, suffix: str, words: str, selector_of: Any) -> Recipe:
    values = loaded.recipe.model_dump(by_alias=True, exclude_unset=True, mode="json")
    *ruled, default = loaded.recipe.policies()

    def changed(gate: dict[str, Any] | None, policy: Policy) -> dict[str, Any] | None:
        change = _gate(policy, selector_of)
        if not change:
            return gate
        kept = {key: value for key, value in (gate or {}).items() if key not in (*SELECTORS, "per")}
        return {**kept, **change}

    values["gate"] = changed(values["gate"], default)
    for rule, policy in zip(values.get("rules", ()), ruled, strict=True):
        if policy.keep is None and (gate := changed(rule.get("gate"), policy)) is not None:
            rule["gate"] = gate
    name = loaded.recipe.name or loaded.path.stem
    values["name"] = f"{name}-{suffix}"[:200]
    values["description"] = f"Control of {name}: {words}."
    output = values.get("output") or {}
    if output.get("path"):
        output["path"] = f"{output['path'].rstrip('/')}-{suffix}"
    _move(loaded, values, folder)
    return Recipe.model_validate_json(_json(values))


def _json(values: dict[str, Any]) -> str:
    import json

    return json.dumps(values)


def _move(loaded: LoadedRecipe, values: dict[str, Any], folder: Path) -> None:
    """Rewrites the relative paths of a plain recipe to start at another folder."""

    def seen(path: str, absolute: Path) -> str:
        if path.startswith("~") or os.path.isabs(path):
            return path
        moved = os.path.relpath(absolute, folder)
        return moved if moved.startswith(".") else f"./{moved}"

    for role, source in loaded.recipe.sources.roles().items():
        local, given = loaded.local(source), values["sources"][role]
        if local is None:
            continue
        if isinstance(given, str):
            values["sources"][role] = seen(given, local)
        else:
            key = next(key for key in ("model", "adapter", "location") if given.get(key))
            given[key] = seen(given[key], local)
    for part in (values, *values.get("rules", ())):
        gate, mask = part.get("gate") or {}, (part.get("merge") or {}).get("mask")
        for owner in (gate, gate.get("complement") or {}):
            if owner.get("names_file"):
                owner["names_file"] = seen(owner["names_file"], loaded.resolve(owner["names_file"]))
        if mask:
            mask["path"] = seen(mask["path"], mask_path(loaded.directory, mask["path"]))
    for part, key in ((values.get("output"), "path"), (values.get("evaluate"), "task_path")):
        if part and part.get(key):
            part[key] = seen(part[key], loaded.resolve(part[key]))
