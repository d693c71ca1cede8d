"""Selectors: which candidates of a gate are merged, each with the reason.

A candidate is a tensor, or a group of tensors decided together, with its value and the half-width of the
interval the value is known to. A selector answers for all candidates of a gate at once; before anything is
measured it may refuse what cannot be satisfied, and between measuring and deciding it names the candidates
whose interval leaves the answer open. Pure; knows no tensor and no file.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safemerge_recipes.errors import PlanError, RecipeError
from safemerge_recipes.recipe.model import Gate
from safemerge_recipes.recipe.patterns import compile_patterns
from safemerge_recipes.tensor_names import module_type


@dataclass(frozen=True, slots=True)
class Candidate:
    """One decision to make. `value` None: the metric is undefined (`why`) or was not measured."""

    name: str
    value: float | None
    error: float = 0.0
    why: str | None = None

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return (self.value or 0.0) - self.error

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return (self.value or 0.0) + self.error


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a tensor is merged, and why."""

    merge: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Question:
    """What a selector is asked.

    Attributes:
        gate: the gate, for its metric and direction.
        key: the key of the recipe that holds the selector, for messages.
        value: what the recipe says there (a plugin's selector gets its options, a dict).
        per: "module" where candidates are ranked within their module type.
        candidates: all of them; with values unless the gate needs no metric or nothing is measured yet.
        selectors: every selector by key, for those that are made of others.
    """

    gate: Gate
    key: str
    value: Any
    per: str | None
    candidates: Sequence[Candidate]
    selectors: Mapping[str, Selector]

    @property
    def above(self) -> bool:
        """Whether high values are chosen."""
        return self.gate.direction == "above"

    def families(self) -> list[list[Candidate]]:
        """The candidates that are ranked against each other."""
        return list(by_type(self.candidates).values()) if self.per == "module" else [list(self.candidates)]


def every_interval(question: Question) -> set[str]:
    """Every candidate that is not known exactly: right for any selector, if costly."""
    return {c.name for c in question.candidates if c.error}


def no_check(question: Question) -> None:
    """Refuses nothing."""


@dataclass(frozen=True, slots=True)
class Selector:
    """A way to choose; what the entry-point group `safemerge.selectors` names.

    Attributes:
        decide: a decision for every candidate of the question.
        unsettled: names of the candidates whose interval leaves the decisions open.
        check: asked before anything is measured, with candidates that have no values yet; raises PlanError
            or RecipeError for what cannot be satisfied.
    """

    decide: Callable[[Question], Mapping[str, Decision]]
    unsettled: Callable[[Question], set[str]] = every_interval
    check: Callable[[Question], None] = no_check


def by_type(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """The candidates of each module type."""
    found: dict[str, list[Candidate]] = {}
    for one in candidates:
        found.setdefault(module_type(one.name), []).append(one)
    return found


def ask(gate: Gate, candidates: Sequence[Candidate], selectors: Mapping[str, Selector]) -> tuple[Selector, Question]:
    """The selector of a gate and its question. Raises RecipeError when a plugin's selector is not known."""
    return _ask(gate, gate, "gate", candidates, selectors)


def _ask(
    gate: Gate, holder: Any, place: str, candidates: Sequence[Candidate], selectors: Mapping[str, Selector]
) -> tuple[Selector, Question]:
    key, value = holder.selector
    question = Question(gate, f"{place}.{key}", value, getattr(holder, "per", None), candidates, selectors)
    if key != "plugin":
        return selectors[key], question
    if value.name not in selectors:
        raise RecipeError(
            f"{place}.plugin.name: {value.name!r} is not known; expected one of {', '.join(selectors)}; "
            "`safemerge plugins` lists them"
        )
    return selectors[value.name], replace(question, value=dict(value.options))


# Thresholds


def _threshold(at_most: bool) -> Selector:
    def sign(question: Question, merges: bool) -> str:
        strict, loose = (">", "≥") if question.above else ("<", "≤")
        if merges:
            return loose if at_most else strict
        opposite = {"<": "≥", "≤": ">", ">": "≤", "≥": "<"}
        return opposite[loose if at_most else strict]

    def decide(question: Question) -> dict[str, Decision]:
        limit, decisions = float(question.value), {}
        word, key = question.gate.metric, question.key.rpartition(".")[2]
        for c in question.candidates:
            value = c.value if c.value is not None else math.nan
            inside = value > limit if question.above else value < limit
            merges = inside or (at_most and value == limit)
            decisions[c.name] = Decision(merges, f"{word} {value:.4g} {sign(question, merges)} {key} {limit:g}")
        return decisions

    def unsettled(question: Question) -> set[str]:
        return {c.name for c in question.candidates if c.error and c.low <= question.value <= c.high}

    return Selector(decide, unsettled)


TAU = _threshold(at_most=False)
AT_MOST = _threshold(at_most=True)


# Ranks


def _ranked(question: Question, family: Sequence[Candidate]) -> list[Candidate]:
    """From first to last to be chosen; ties by name."""
    sign = -1 if question.above else 1
    return sorted(family, key=lambda c: (sign * (c.value or 0.0), c.name))


def _rank(count_of: Callable[[Any, int], int]) -> Selector:
    def check(question: Question) -> None:
        for family in question.families():
            count = count_of(question.value, len(family))
            if count > len(family):
                of = f" of type {module_type(family[0].name)}" if question.per and family else ""
                raise PlanError(
                    f"{question.key}: {count} are to be chosen, only {len(family)}{of} can be; "
                    "lower it, or widen gate.scope"
                )

    def decide(question: Question) -> dict[str, Decision]:
        check(question)
        word, end = question.gate.metric, "highest" if question.above else "lowest"
        decisions: dict[str, Decision] = {}
        for family in question.families():
            count = count_of(question.value, len(family))
            for place, c in enumerate(_ranked(question, family)):
                text = f"{word} {c.value:.4g} is {end} {place + 1} of {len(family)} ({count} merge)"
                decisions[c.name] = Decision(place < count, text)
        return decisions

    def unsettled(question: Question) -> set[str]:
        sign = -1 if question.above else 1
        names: set[str] = set()
        for family in question.families():
            ranked = _ranked(question, family)
            count = min(count_of(question.value, len(family)), len(family))
            inside, outside = ranked[:count], ranked[count:]
            if not inside or not outside:
                continue
            # Seen in the direction of the ranking, `far` ends of what is in must stay below `near` ends of the rest.
            far = {c.name: max(sign * c.low, sign * c.high) for c in ranked}
            near = {c.name: min(sign * c.low, sign * c.high) for c in ranked}
            last_in, first_out = max(far[c.name] for c in inside), min(near[c.name] for c in outside)
            names |= {c.name for c in inside if c.error and far[c.name] >= first_out}
            names |= {c.name for c in outside if c.error and near[c.name] <= last_in}
        return names

    return Selector(decide, unsettled, check)


LOWEST = _rank(lambda value, members: int(value))
FRACTION = _rank(lambda value, members: math.ceil(value * members - 1e-9))


# Choices without the metric


def _drawn(question: Question) -> list[str]:
    """Names at random. Per module type: the counts given, or proportional to the types' sizes (largest remainders)."""
    value, ordered = question.value, sorted(question.candidates, key=lambda c: c.name)
    draw = random.Random(value.seed)
    if isinstance(value.count, Mapping):
        types = by_type(ordered)
        groups = [(types.get(kind, []), count, kind) for kind, count in sorted(value.count.items())]
    elif value.per == "module":
        found = list(by_type(ordered).items())
        shares = [value.count * len(group) / len(ordered) for _, group in found]
        counts = [int(share) for share in shares]
        rest = sorted(range(len(found)), key=lambda i: (counts[i] - shares[i], i))
        for i in rest[: max(0, value.count - sum(counts))]:
            counts[i] += 1
        groups = [(group, count, kind) for (kind, group), count in zip(found, counts, strict=True)]
    else:
        groups = [(ordered, value.count, "")]
    chosen: list[str] = []
    for group, count, kind in groups:
        if count > len(group):
            where = f".{kind}" if kind else ""
            raise PlanError(
                f"{question.key}.count{where}: {count} are to be drawn, only {len(group)} are gated; "
                "lower it, or widen gate.scope"
            )
        chosen += draw.sample([c.name for c in group], count)
    return chosen


def _random(question: Question) -> dict[str, Decision]:
    chosen, seed = set(_drawn(question)), question.value.seed
    words = {True: f"drawn at random (seed {seed})", False: f"not drawn at random (seed {seed})"}
    return {c.name: Decision(c.name in chosen, words[c.name in chosen]) for c in question.candidates}


def _draw_check(question: Question) -> None:
    if question.candidates:
        _drawn(question)


def _named(question: Question) -> dict[str, Decision]:
    matcher = compile_patterns(question.value)
    found = {c.name: matcher(c.name) for c in question.candidates}
    words = {True: f"named by {question.key}", False: f"not named by {question.key}"}
    return {name: Decision(matches, words[matches]) for name, matches in found.items()}


def _named_check(question: Question) -> None:
    if question.candidates and not any(decision.merge for decision in _named(question).values()):
        raise RecipeError(
            f"{question.key}: matches none of the {len(question.candidates)} gated tensors; check the patterns, "
            f"expected names such as {question.candidates[0].name!r}"
        )


def _constant(merge: bool) -> Selector:
    word = "always" if merge else "never"
    return Selector(lambda q: {c.name: Decision(merge, word) for c in q.candidates}, lambda q: set())


RANDOM = Selector(_random, lambda question: set(), _draw_check)
NAMES = Selector(_named, lambda question: set(), _named_check)
ALWAYS = _constant(True)
NEVER = _constant(False)


# What is made of another


def _inner(question: Question) -> tuple[Selector, Question]:
    return _ask(question.gate, question.value, question.key, question.candidates, question.selectors)


def _complement(question: Question) -> dict[str, Decision]:
    selector, inner = _inner(question)
    return {
        name: Decision(not one.merge, f"complement of: {one.reason}") for name, one in selector.decide(inner).items()
    }


def _complement_unsettled(question: Question) -> set[str]:
    selector, inner = _inner(question)
    return selector.unsettled(inner)


def _complement_check(question: Question) -> None:
    selector, inner = _inner(question)
    selector.check(inner)


COMPLEMENT = Selector(_complement, _complement_unsettled, _complement_check)

SELECTORS: Mapping[str, Selector] = {
    "tau": TAU,
    "at_most": AT_MOST,
    "lowest": LOWEST,
    "fraction": FRACTION,
    "random": RANDOM,
    "complement": COMPLEMENT,
    "names": NAMES,
    "names_file": NAMES,
    "always": ALWAYS,
    "never": NEVER,
}
"""The built-in selectors, by their key in a gate."""
