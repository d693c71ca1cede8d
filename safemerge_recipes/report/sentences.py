"""A plan in words: what a gate selects, what was merged, how far ρ lies from chance. Overview in, plain text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safemerge_recipes.recipe.builtins import METHODS, SELECTORS
from safemerge_recipes.report.overview import Overview, mapping, selector, sequence, threshold_of
from safemerge_recipes.text import clean, count, figure, grouped, number, percent, things

SYMBOLS: Mapping[str, str] = {"rho": "ρ", "rho_ratio": "ρ/ρ₀", "norm_ratio": "‖Δf‖/‖V‖"}
"""Metrics that have a symbol."""


def symbol(metric: object) -> str:
    """How a metric is written."""
    return SYMBOLS.get(str(metric), clean(metric, 40))


def criterion(gate: Mapping[str, Any]) -> str:
    """What a gate selects, such as `where ρ < 0.35`; empty where it does not say."""
    key, value = selector(gate)
    metric, above = symbol(gate.get("metric") or "rho"), gate.get("direction") == "above"
    end = "highest" if above else "lowest"
    per = " of each module type" if gate.get("per") == "module" else ""
    if key in ("tau", "at_most"):
        limit = threshold_of(gate, above)
        return f"where {metric} {limit.sign} {figure(limit.value)}" if limit else ""
    if key == "lowest":
        return f"the {count(value)} {end} in {metric}{per}"
    if key == "fraction":
        return f"the {percent(number(value) or 0.0, None)} {end} in {metric}{per}"
    if key == "random":
        return f"drawn at random (seed {count(mapping(value).get('seed'))})"
    if key == "complement":
        inner = criterion({"metric": gate.get("metric"), "direction": gate.get("direction"), **mapping(value)})
        return f"all but those {inner}"
    return {
        "names": "as named in the recipe",
        "names_file": "as named in a file",
        "always": "without a condition",
    }.get(key, "")


def criteria(recipe: Mapping[str, Any]) -> list[str]:
    """What the recipe's gate selects, then what those of its rules select that differ."""
    gate = mapping(recipe.get("gate"))
    found = {criterion(gate): None}
    common = {key: value for key, value in gate.items() if key not in SELECTORS}
    for rule in map(mapping, sequence(recipe.get("rules"))):
        change = mapping(rule.get("gate"))
        if selector(change)[0]:
            found[criterion({**common, **change})] = None
    return [text for text in found if text]


def method_words(view: Overview, method: str) -> str:
    """A method with its α or weights: `linear, α = 0.8`, `linear, α from 0.7 to 0.8` where rules or depth differ,
    `ties of finetuned 0.7, safety 0.2, math -0.3`."""
    weighed = [line.weights for line in view.lines if line.merged and line.method == method and line.weights]
    if weighed:
        names = dict.fromkeys(name for weights in weighed for name, _ in weights)
        spans = {name: sorted(dict(weights)[name] for weights in weighed if name in dict(weights)) for name in names}
        return f"{method} of " + ", ".join(f"{name} {_span(values)}" for name, values in spans.items())
    alphas = sorted(
        {line.alpha for line in view.lines if line.merged and line.method == method and line.alpha is not None}
    )
    if not alphas:
        return method
    if len(alphas) == 1:
        return f"{method}, α = {figure(alphas[0])}"
    return f"{method}, α from {figure(alphas[0])} to {figure(alphas[-1])}"


def _span(values: Sequence[float]) -> str:
    low, high = figure(values[0]), figure(values[-1])
    return low if low == high else f"{low} to {high}"


def methods(view: Overview) -> list[tuple[str, str, str]]:
    """The methods in use: in words with α, where each comes from, and its formula; of plugins only their names."""
    rows = ((one, METHODS.get(one)) for one in view.methods()[:8])
    return [(method_words(view, one), row.link if row else "", row.formula if row else "") for one, row in rows]


def sentence(view: Overview, done: bool) -> str:
    """What is merged, or was, in one sentence."""
    gated = view.gated
    merged = sum(line.merged for line in gated)
    verb = ("was merged" if merged == 1 else "were merged") if done else ("merges" if merged == 1 else "merge")
    if not gated:
        verb = "was" if done else "is"
        return f"None of the {things(len(view.lines), 'tensor')} is gated; nothing {verb} merged."
    known = criteria(view.recipe)
    why = f", {known[0]}" if known else ""
    more = f", or by rule {known[1]}" if len(known) == 2 else ", or by rules" if known[1:] else ""
    rest = len(view.lines) - merged
    return (
        f"{grouped(merged)} of {things(len(gated), 'gated tensor')} {verb}{why}{more}; "
        f"the other {things(rest, 'tensor')} keep{'s' if rest == 1 else ''} {kept_from(view)}."
    )


def kept_from(view: Overview) -> str:
    """Whose values the kept tensors have."""
    words = {"finetuned": "fine-tuned", "aligned": "aligned", "safety": "safety"}
    roles = dict.fromkeys(line.source or "finetuned" for line in view.lines if not line.merged)
    named = [words.get(role, role) for role in roles] or ["fine-tuned"]
    return f"the {' or '.join(named)} value{'s' if len(view.lines) > 1 else ''}"


NEAR = 0.1
"""A ρ within this part of its ρ₀ is told from chance by nobody who looks at one tensor."""


def chance(view: Overview) -> str:
    """What is to be said where every ρ, or nearly every one, sits on its ρ₀; else nothing.

    Where a plan knows the spread of ρ₀, it judges that itself, among its warnings.
    """
    if any(line.rho_z is not None for line in view.gated):
        return ""
    ratios = [line.ratio for line in view.gated if line.ratio is not None]
    near = sum(abs(ratio - 1) <= NEAR for ratio in ratios)
    if len(ratios) < 2 or near < 0.95 * len(ratios):
        return ""
    which = "Every ρ" if near == len(ratios) else f"{grouped(near)} of {grouped(len(ratios))} ρ"
    return (
        f"{which} lie{'s' if near == len(ratios) else ''} within {percent(NEAR, 0)} of ρ₀, where an update that has "
        "nothing to do with alignment would lie: here ρ hardly tells one tensor from another, so compare with the "
        "random controls before trusting this choice."
    )
