"""Choices of tensors held against random choices of as many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean, median
from typing import Any

from benchmarks.first_study.results import HALVES, REFUSAL, entry_of, skill_task
from safemerge_recipes.evaluation.experiments.controls import exact_p

FEWEST = 3  # draws that a choice is held against


def together(p_values: Sequence[float]) -> float:
    """Fisher's combined p of independent tests: the tail of χ² with 2k degrees of freedom at −2 Σ ln p."""
    x, term, total = -sum(map(log, p_values)), 1.0, 0.0
    for i in range(len(p_values)):
        total += term
        term *= x / (i + 1)
    return min(1.0, exp(-x) * total)


@dataclass(frozen=True)
class Contest:
    """A choice of tensors held against random choices of as many, family by family.

    Attributes:
        name: Of the choice.
        control: Of the random choices.
        values: Family -> the rate with the choice.
        draws: Family -> the rates with random ones; at least `FEWEST`.
    """

    name: str
    control: str
    values: dict[str, float]
    draws: dict[str, list[float]]

    def p(self, family: str) -> float:
        """One-sided, exact: the choice is one more random draw."""
        return exact_p(self.values[family], self.draws[family])

    @property
    def joint(self) -> float:
        """All families together."""
        return together([self.p(family) for family in self.values])

    @property
    def least(self) -> float:
        """What `joint` would be if the choice beat every draw of every family."""
        return together([1 / (1 + len(self.draws[family])) for family in self.values])

    @property
    def advantage(self) -> float:
        """Mean over families of what it has over the median draw."""
        return fmean(self.values[family] - median(self.draws[family]) for family in self.values)

    def cells(self, families: Iterable[str]) -> list[str]:
        """Of a table's row."""
        own = [
            f"{100 * (self.values[f] - median(self.draws[f])):+.1f} ({self.p(f):.2f})" if f in self.values else "–"
            for f in families
        ]
        return [*own, f"{100 * self.advantage:+.1f} ({self.joint:.2f})"]


def _rates(results: dict[str, Any], split: str, task: str, metric: str) -> dict[str, float]:
    end = "_tuning" if split == "tuning" else ""
    found = {label: entry_of(tasks, task + end, metric) for label, tasks in results["scores"][split].items()}
    return {label: entry["value"] for label, entry in found.items() if entry}


def contests(
    families: Sequence[dict[str, Any]], split: str, metric: str, choices: Mapping[str, Sequence[str]]
) -> list[Contest]:
    """Choices that were scored along with their controls.

    Args:
        families: Results.
        split: Where they were scored.
        metric: `refusal`, or `acc` of the family's task.
        choices: Label -> the controls it is held against.
    """
    found = []
    for label, kinds in choices.items():
        for kind in kinds:
            values, draws = {}, {}
            for results in families:
                rates = _rates(results, split, REFUSAL if metric == "refusal" else skill_task(results), metric)
                drawn = [rate for name, rate in rates.items() if name.startswith(f"{kind}, seed ")]
                if label in rates and len(drawn) >= FEWEST:
                    values[results["family"]], draws[results["family"]] = rates[label], drawn
            if values:
                found.append(Contest(label.removesuffix(", α = 0.5"), kind, values, draws))
    return found


def halves(families: Sequence[dict[str, Any]]) -> list[Contest]:
    """The halves that a metric picks, each against random halves of its own kind."""
    labels = dict.fromkeys(m for results in families for m in results["models"] if "half" in m and ", seed " not in m)
    choices = {label: [HALVES["within module type" in label]] for label in labels}
    return contests(families, "tuning", "refusal", choices)


def shown(found: Sequence[Contest]) -> tuple[float, float]:
    """(The smallest joint p, the smallest there could be), after Bonferroni's correction."""
    return (
        min(1.0, min(one.joint for one in found) * len(found)),
        min(1.0, min(one.least for one in found) * len(found)),
    )
