"""Controls of a planned recipe: what would have happened with other tensors, as many of them.

A gate is worth something only against choices that know nothing: as many tensors at random, as many of each
module type at random, exactly the others, all, and none. A control is the same recipe with other selectors, so
that nothing but the choice differs, and it is planned like any recipe. Works from a plan, since the counts are
the gate's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safemerge_recipes.errors import WriteError
from safemerge_recipes.planning.plan import Plan
from safemerge_recipes.recipe.gate import decides_by_metric
from safemerge_recipes.recipe.loading import LoadedRecipe
from safemerge_recipes.recipe.model import SELECTORS, Gate, Policy, Recipe
from safemerge_recipes.recipe.writing import dump_recipe
from safemerge_recipes.storage.files import remove_left, write_file
from safemerge_recipes.tensor_names import module_type

Kind = Literal["random", "random per module", "complement", "merge all", "merge none"]


@dataclass(frozen=True, slots=True)
class Control:
    """One control: its kind and, where it is drawn, the seed."""

    kind: Kind
    seed: int | None = None

    @property
    def label(self) -> str:
        """What its scores are called."""
        return self.kind if self.seed is None else f"{self.kind} {self.seed}"

    @property
    def suffix(self) -> str:
        """What is appended to the recipe's name."""
        return _SUFFIXES[self.kind] if self.seed is None else f"{_SUFFIXES[self.kind]}-{self.seed}"

    @property
    def words(self) -> str:
        """What it merges, in words."""
        return _WORDS[self.kind] if self.seed is None else f"{_WORDS[self.kind]}, seed {self.seed}"

    def selector(self, gate: Gate, chosen: Mapping[str, int]) -> dict[str, Any]:
        """The selector that takes the place of a gate's, as a recipe says it.

        Args:
            gate: the gate.
            chosen: module type -> how many tensors the gate chose.
        """
        if self.kind == "random":
            return {"random": {"count": sum(chosen.values()), "seed": self.seed}}
        if self.kind == "random per module":
            return {"random": {"count": dict(sorted(chosen.items())) or 0, "seed": self.seed}}
        if self.kind == "complement":
            return _complement(gate)
        return {"always": True} if self.kind == "merge all" else {"never": True}

    def recipe(self, plan: Plan) -> Recipe:
        """The control of a planned recipe. Paths in it are relative to what the recipe's own are.

        Gates that choose without the metric are no choice to be controlled and stay; given names are one.
        """
        recipe, chosen = plan.recipe, _chosen(plan)
        values = recipe.model_dump(by_alias=True, exclude_unset=True, mode="json")
        *ruled, default = recipe.policies()

        def changed(gate: dict[str, Any] | None, policy: Policy) -> dict[str, Any] | None:
            chooser = policy.gate.selector[0]
            if chooser != "names" and not decides_by_metric(chooser):
                return gate
            change = self.selector(policy.gate, chosen.get(policy.rule, {}))
            if self.kind != "complement":
                # Decided tensor by tensor, whatever the gate decided together, and also where ρ is undefined.
                change["granularity"] = "tensor"
            return {key: value for key, value in (gate or {}).items() if key not in (*SELECTORS, "per")} | change

        values["gate"] = changed(values["gate"], default)
        for rule, policy in zip(values.get("rules", ()), ruled, strict=True):
            if policy.keep is None and (gate := changed(rule.get("gate"), policy)) is not None:
                rule["gate"] = gate
        return Recipe.model_validate(values)


_SUFFIXES: Mapping[Kind, str] = {
    "random": "random",
    "random per module": "random-by-type",
    "complement": "complement",
    "merge all": "all",
    "merge none": "none",
}
_WORDS: Mapping[Kind, str] = {
    "random": "as many tensors at random",
    "random per module": "as many tensors of each module type at random",
    "complement": "exactly the tensors that the gate does not choose",
    "merge all": "every gated tensor merged",
    "merge none": "nothing merged",
}


def controls(seeds: int) -> tuple[Control, ...]:
    """Every control: random ones of both kinds for the seeds 0, 1, …, then the complement, all, none."""
    drawn: tuple[Kind, Kind] = ("random", "random per module")
    fixed: tuple[Kind, ...] = ("complement", "merge all", "merge none")
    return (*(Control(kind, seed) for kind in drawn for seed in range(seeds)), *map(Control, fixed))


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


# As files


def write_controls(loaded: LoadedRecipe, plan: Plan, folder: Path, seeds: int) -> list[Path]:
    """Writes every control of a planned recipe as a recipe of its own; returns their paths.

    Args:
        loaded: the recipe; its relative paths are rewritten to start at `folder`.
        plan: its plan.
        folder: where the controls go; made if missing.
        seeds: how many random controls of each kind.

    Raises:
        WriteError: the folder cannot be written to.
    """
    texts = {f"{loaded.path.stem}-{one.suffix}.yaml": _text(one, loaded, plan, folder) for one in controls(seeds)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_left(folder, texts)
        for name, text in texts.items():
            write_file(folder / name, text)
    except OSError as error:
        raise WriteError(f"{folder}: {error.strerror}; choose another --output") from None
    return [folder / name for name in texts]


def _text(control: Control, loaded: LoadedRecipe, plan: Plan, folder: Path) -> str:
    recipe, name = control.recipe(plan), loaded.recipe.name or loaded.path.stem
    output = recipe.output
    if output.path:
        output = output.model_copy(update={"path": f"{output.path.rstrip('/')}-{control.suffix}"})
    told = {"name": f"{name}-{control.suffix}"[:200], "description": f"Control of {name}: {control.words}."}
    named = recipe.model_copy(update={**told, "output": output})
    moved = replace(loaded, recipe=named).seen_from(folder)
    return f"# Control of {loaded.path.name}: {control.words}.\n{dump_recipe(moved)}"


# Choices by name, and what they are worth


def merged(plan: Plan) -> frozenset[str]:
    """Names of the gated tensors that the plan merges."""
    return frozenset(tensor.name for tensor in plan.gated if tensor.action == "merge")


def choosable(plan: Plan) -> tuple[str, ...]:
    """Names of the gated tensors that a choice is about, sorted; not those where V or Δf is zero."""
    return tuple(sorted(t.name for t in plan.gated if t.moments is None or not t.moments.degenerate))


def with_merged(plan: Plan, names: Collection[str], reason: str) -> Plan:
    """The plan that merges exactly these of its gated tensors.

    Raises:
        ValueError: a name is not that of a gated tensor.
    """
    chosen = frozenset(names)
    unknown = chosen - {tensor.name for tensor in plan.gated}
    if unknown:
        raise ValueError(f"not gated: {min(unknown)}")
    tensors = tuple(
        replace(t, action="merge" if t.name in chosen else "keep", reason=reason) if t.gated else t
        for t in plan.tensors
    )
    return replace(plan, tensors=tensors)


def exact_p(value: float, draws: Sequence[float]) -> float:
    """One-sided exact p of the hypothesis that the choice is one more random draw.

    The share of values at least as high among the draws and the value itself: (1 + #{draw ≥ value}) / (n + 1).
    With n draws it cannot fall below 1 / (n + 1).
    """
    return (1 + sum(draw >= value for draw in draws)) / (1 + len(draws))
