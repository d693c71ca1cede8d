"""From recipe and sources to a plan.

`survey` says what is gated and by which policy (headers only); `make_plan` decides, and asks for measurements of the
gated tensors as far as that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from safemerge_recipes.errors import PlanError, RecipeError
from safemerge_recipes.gate.decide import candidate, check, decide, unsettled
from safemerge_recipes.gate.metrics import METRICS, Metric
from safemerge_recipes.gate.moments import Effort, Moments
from safemerge_recipes.gate.selectors import SELECTORS, Candidate, Decision, Selector
from safemerge_recipes.planning.outcome import beneath_noise, check_v, findings
from safemerge_recipes.planning.plan import Outlook, Plan, TensorPlan
from safemerge_recipes.planning.stored import as_stored
from safemerge_recipes.recipe.model import Gate, Policy, Recipe
from safemerge_recipes.recipe.patterns import Matcher, compile_patterns
from safemerge_recipes.sources.family import Family
from safemerge_recipes.storage.dtypes import BY_TORCH_NAME, FLOAT_DTYPES
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.tensor_names import block_index, block_of, is_block_matrix, module_of, stack_of

AT_ONCE = 8
"""Least number of unsettled tensors that are measured exactly together; beyond that, half of them."""

Measure = Callable[[Sequence[str], Effort, int, bool], Mapping[str, Moments]]
"""(tensor names, effort, leading directions of V or 0, whether ρ₀ matters) -> moments: the one way in which
planning reads data."""


def _policies(recipe: Recipe, names: Sequence[str]) -> dict[str, Policy]:
    """The policy of each tensor; a rule that matches nothing is an error."""
    found: dict[str, Policy] = {}
    policies = recipe.policies()
    for policy in policies:
        matcher = compile_patterns(policy.patterns)
        if policy.rule is None:
            found.update({name: policy for name in names if name not in found})
            continue
        matched = matcher.select(names)
        if not matched:
            raise RecipeError(
                f"rules.{policy.rule}.tensors: {', '.join(policy.patterns)[:200]} matches none of the {len(names)} "
                f"tensors; expected at least one, such as {names[0]!r}"
            )
        for name in matched:
            found.setdefault(name, policy)
    return found


def _scope(scope: Matcher | None, name: str, ref: TensorRef, gate: Gate, coded: bool) -> str | None:
    """Why a tensor is not gated, or None if it is. Vectors have no ρ: they are gated where a list names them."""
    if scope is not None:
        listed = gate.selector[0] == "names" and ref.shape
        if not scope(name):
            return "outside gate.scope"
        if len(ref.shape) not in (2, 3) and not listed:
            return f"in gate.scope, but {len(ref.shape)}-D: only matrices and stacks of them are gated"
        if not ref.numel:
            return "in gate.scope, but empty"
    elif not is_block_matrix(name, ref.shape):
        return "not a matrix of a linear layer in a numbered block"
    if ref.dtype not in FLOAT_DTYPES and not coded:
        return f"stored as {ref.dtype}, which cannot be merged"
    return None


def _quantised(family: Family, name: str) -> str | None:
    kind = family.quantised.get(name)
    return f"a part of a quantised weight ({kind}), copied" if kind else None


def _still(family: Family, name: str) -> bool:
    """Whether no side changes a weight, so that merging it would only round it anew."""
    return "safety" not in family.models or family.delta("safety", name).is_zero


def _absent(family: Family, name: str) -> str | None:
    role = family.absent.get(name)
    return "only in aligned" if role == "finetuned" else f"sources.{role} does not have it" if role else None


def survey(recipe: Recipe, family: Family, metrics: Mapping[str, Metric] = METRICS) -> tuple[Outlook, ...]:
    """What is gated and by which policy, from headers alone.

    Raises:
        RecipeError: a rule matches nothing, or a metric is unknown.
    """
    names = list(family.inventory)
    policies = _policies(recipe, names)
    wanted = BY_TORCH_NAME.get(recipe.output.dtype or "")
    scopes = {p.rule: compile_patterns(p.gate.scope) if p.gate.scope else None for p in recipe.policies()}
    outlooks = []
    for name, ref in family.inventory.items():
        policy = policies[name]
        coded = family.form(name) is not None
        dtype = wanted if wanted and ref.dtype in FLOAT_DTYPES and name not in family.quantised else ref.dtype
        delta = family.delta("finetuned", name)
        if policy.keep is not None:
            outlook = Outlook(name, ref.shape, dtype, None, f"rules.{policy.rule}: keep {policy.keep}", policy.keep)
        else:
            scope = scopes[policy.rule]
            why = _quantised(family, name) or _scope(scope, name, ref, policy.gate, coded) or _absent(family, name)
            if why is None and delta.is_zero and (policy.gate.scope is None or (coded and _still(family, name))):
                why = "fine-tuning did not change it"
            if why is None and policy.gate.metric not in metrics:
                raise RecipeError(
                    f"gate.metric: {policy.gate.metric!r} is not known; expected one of {', '.join(metrics)}"
                )
            gated = _at_depth(policy, name, family) if why is None else None
            outlook = Outlook(name, ref.shape, dtype, gated, why or "")
        outlooks.append(outlook)
    return tuple(outlooks)


def _at_depth(policy: Policy, name: str, family: Family) -> Policy:
    """The policy with numbers where its merge has gradients over the depth of the model.

    Raises:
        RecipeError: the tensor is in no block, or there are more values than blocks.
    """
    try:
        merge = policy.merge.at(block_index(name), family.blocks.get(stack_of(name) or "", 0))
    except ValueError as error:
        place = "merge" if policy.rule is None else f"rules.{policy.rule}.merge"
        raise RecipeError(f"{place}: {name}: {error}") from None
    return policy if merge is policy.merge else replace(policy, merge=merge)


def _groups(gate: Gate, names: Sequence[str]) -> dict[str, list[str]]:
    """Names decided together, by the group's name."""
    if gate.granularity == "tensor":
        return {name: [name] for name in names}
    key = module_of if gate.granularity == "module" else lambda name: block_of(name) or name
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _sum(parts: Sequence[Moments | None]) -> Moments | None:
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    total = known[0]
    for part in known[1:]:
        total = total + part
    return total


def _decide_policy(
    policy: Policy,
    names: list[str],
    matrices: set[str],
    measure: Measure | None,
    metrics: Mapping[str, Metric],
    selectors: Mapping[str, Selector],
) -> tuple[dict[str, Decision], dict[str, Candidate], dict[str, Moments]]:
    """Decisions, group values and moments of the tensors under one policy, the matrices measured as far as needed."""
    gate = policy.gate
    groups = _groups(gate, names)
    # A group's interval does not follow from its members' intervals of ρ, so groups are measured exactly.
    effort: Effort = "exact" if gate.precision == "exact" or gate.granularity != "tensor" else "sketch"
    rank = gate.rank if gate.uses_rank else 0
    null = gate.metric not in METRICS or METRICS[gate.metric].null  # a plugin's may look at anything
    moments: dict[str, Moments] = {}
    wanted, settled = [name for name in names if name in matrices], set[str]()
    while True:
        if measure and wanted:
            moments.update(measure(wanted, effort, rank, null))
        settled.update(wanted if effort == "exact" else ())
        candidates = {
            group: candidate(group, _sum([moments.get(name) for name in members]), gate, metrics)
            for group, members in groups.items()
        }
        open_ = unsettled(gate, list(candidates.values()), selectors)
        unsure = [group for group in groups if group in open_ and not settled.issuperset(groups[group])]
        if measure is None or not unsure:
            break
        # Where ranks decide, a wide interval leaves others open that are settled once it is gone: widest first.
        effort, widest = "exact", sorted(unsure, key=lambda group: -candidates[group].error)
        wanted = [name for group in widest[: max(AT_ONCE, -(-len(widest) // 2))] for name in groups[group]]
    decisions = decide(gate, list(candidates.values()), selectors)
    spread = {name: group for group, members in groups.items() for name in members}
    return (
        {name: decisions[group] for name, group in spread.items()},
        {name: candidates[group] for name, group in spread.items()},
        moments,
    )


def check_gates(outlooks: Sequence[Outlook], selectors: Mapping[str, Selector] = SELECTORS) -> None:
    """Refuses, before anything is measured, selectors that cannot be satisfied by what is gated.

    Raises:
        PlanError: more tensors are to be chosen than are gated.
        RecipeError: patterns name nothing that is gated.
    """
    for policy, names in _by_policy(outlooks):
        check(policy.gate, list(_groups(policy.gate, names)), selectors)


def _by_policy(outlooks: Sequence[Outlook]) -> list[tuple[Policy, list[str]]]:
    """The gated tensors under each policy that has any."""
    found: dict[int | None, tuple[Policy, list[str]]] = {}
    for outlook in outlooks:
        if outlook.policy is not None:
            found.setdefault(outlook.policy.rule, (outlook.policy, []))[1].append(outlook.name)
    return list(found.values())


def make_plan(
    recipe: Recipe,
    family: Family,
    outlooks: Sequence[Outlook],
    measure: Measure | None,
    metrics: Mapping[str, Metric] = METRICS,
    selectors: Mapping[str, Selector] = SELECTORS,
) -> Plan:
    """Decides every tensor.

    Args:
        recipe: the recipe.
        family: its sources.
        outlooks: what `survey` found.
        measure: how tensors are measured; None where there is no base and so no V.
        metrics: metrics by name.
        selectors: selectors by key or, plugins' ones, by name.

    Raises:
        PlanError: the selector cannot be satisfied, or a degenerate tensor is an error.
        SourceError: a source that a merge needs is missing, weights are not finite, or V is zero wherever the gate
            looks.
    """
    by_policy = _by_policy(outlooks)
    decisions: dict[str, Decision] = {}
    candidates: dict[str, Candidate] = {}
    moments: dict[str, Moments] = {}
    matrices = {outlook.name for outlook in outlooks if len(outlook.shape) > 1}
    for policy, names in by_policy:
        found = _decide_policy(policy, names, matrices, measure, metrics, selectors)
        decisions.update(found[0])
        candidates.update(found[1])
        moments.update(found[2])
    if not by_policy and not any(policy.keep for policy in recipe.policies()):
        raise PlanError(
            "no tensor is gated: the fine-tuned model does not differ from the aligned one; check the sources"
        )
    tensors = []
    for o in outlooks:
        if o.policy is None:
            tensors.append(TensorPlan(o.name, o.shape, o.dtype, "keep", o.reason, False, o.take, None, None, None))
            continue
        decision = decisions[o.name]
        tensors.append(
            TensorPlan(
                o.name, o.shape, o.dtype, "merge" if decision.merge else "keep", decision.reason, True,
                "finetuned", o.policy, candidates[o.name].value, moments.get(o.name),
            )
        )  # fmt: skip
    plan = Plan(recipe, tuple(tensors), family.warnings)
    check_v(plan.gated)
    warnings = (*family.warnings, *findings(plan, family), *beneath_noise(plan))
    lines, notes = as_stored(plan.tensors, family, recipe.output)
    return Plan(recipe, lines, (*warnings, *notes))
