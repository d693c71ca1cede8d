"""The demo's aim on every task: a gated merge that brings back 90 % of the lost J for less than 5 points of utility.

Not one of the four comparisons. λ and the share of tensors are chosen on the tuning split of one family of a task, by
the rule of `safemerge sweep`, and every family of the task reports that choice on its test split, beside the model that
it repairs (`aim`); or they are chosen for each family on its own tuning split, as a user would do it (`aim-own`).
Outcomes lie apart from those of the comparisons (docs/evidence/aim).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.study.families import MEANS, SAFETY, Family
from benchmarks.study.findings import name_of, points, scored, sides, span, table, utility, utility_change
from benchmarks.study.models import ALIGNED, FINE_TUNED, HALF, added
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.scoring import Study
from safemerge_recipes.evaluation.experiments.controls import merged
from safemerge_recipes.evaluation.experiments.measures import measures
from safemerge_recipes.evaluation.experiments.sweep import affordable, choose
from safemerge_recipes.evaluation.separation import separation, separation_change
from safemerge_recipes.evaluation.tasks import studies
from safemerge_recipes.storage.files import write_json

CHOSEN = "Δf + λΔs, chosen for the task"
OWN = "Δf + λΔs, chosen for the family"
TAUGHT = "aligned + Δs"
SHARE = 0.9
"""Of the lost J, that is to be brought back."""
LOSS = 0.05
"""Of utility, that it may cost."""
PREFERRED = ("01-qa-safety-13", "02-qa-with-own", "10-qa-with-own")
"""The models of reports on the demo's aligned model, each with the safety adapter that has most J on its tuning split
(docs/preregistration.md, decided before 02 and 10 were scored with theirs)."""


def tried(family: Family) -> Mapping[str, tuple[str, ...]]:
    """label -> overrides of the merges among which is chosen; a mean of adapters is shorter than each of them."""
    weights = (1.5, 2.0, 2.5) if family.safety_rows in MEANS else (1.5, 2.0)
    return {
        f"λ = {weight:g} on the lowest {100 * share:g} %": added(weight, f"gate.fraction={share:g}")
        for weight, share in itertools.product(weights, (0.5, 0.75))
    }


class AimStudy(Study):
    """One family, asked for the aim alone; `results` is the folder of these outcomes."""

    def aim(self) -> bool:
        """Chooses for the task where nothing is chosen yet, then scores the choice on the test split."""
        return self._asked_for(CHOSEN, self.family.scope)

    def aim_own(self) -> bool:
        """The same with a choice for this family alone."""
        return self._asked_for(OWN, self.family.name)

    def aim_tuning(self) -> bool:
        """Chooses for the task and looks at no test split, so that safety adapters can be chosen among as well."""
        return self._merge_for(self.family.scope) is not None

    def aim_own_tuning(self) -> bool:
        """The same with a choice for this family alone."""
        return self._merge_for(self.family.name) is not None

    def _merge_for(self, scope: str) -> str | None:
        path = self.results / f"aim-{scope}.json"
        return self._chosen_before(path) or self._choose_on_tuning(path)

    def _asked_for(self, label: str, scope: str) -> bool:
        chosen = self._merge_for(scope)
        if chosen is None:
            return False
        plan = self.bench.plan(tried(self.family)[chosen])
        for key, found in (("aims", chosen), ("merged", len(merged(plan)))):
            self.outcomes.head.setdefault(key, {})[label] = found
        graphs = {
            ALIGNED: self.bench.role("aligned"),
            FINE_TUNED: self.bench.role("finetuned"),
            label: self.bench.graph(plan),
        }
        if self.family.safety_rows != SAFETY:
            graphs[TAUGHT] = self.bench.role("safety")
        return len(self._scored(graphs, self.tasks, self._take)) == len(graphs)

    def _chosen_before(self, path: Path) -> str | None:
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["chosen"]) if found["settings"] == self.settings.as_json() else None

    def _choose_on_tuning(self, path: Path) -> str | None:
        """Utility is asked first: merges that lose too much of it cannot be chosen, unless all do."""
        plans = {label: self.bench.plan(overrides) for label, overrides in tried(self.family).items()}
        graphs = {FINE_TUNED: self.bench.role("finetuned")} | {
            label: self.bench.graph(plan) for label, plan in plans.items()
        }
        first = self._scored(graphs, self.tuning[2:])
        if len(first) < len(graphs):
            return None
        by = measures(self.bench.suite(self.tuning).better, self.tuning)
        left = [label for label in plans if affordable(first[label], first[FINE_TUNED], by, LOSS)] or list(plans)
        asked = {label: graph for label, graph in graphs.items() if label in (FINE_TUNED, *left)}
        scores = self._scored(asked, self.tuning)
        if len(scores) < len(asked):
            return None
        counts = {label: len(merged(plan)) for label, plan in plans.items()}
        best = choose({label: scores[label] for label in left}, scores[FINE_TUNED], by, LOSS, counts)
        values: dict[str, list[float | None]] = {
            label: [None, round(100 * found.metric(*by.utility[0]).value, 1)] for label, found in first.items()
        }
        values |= {label: [round(100 * one, 1) for one in by.of(found)] for label, found in scores.items()}
        content: dict[str, Any] = {"chosen": best, "on": self.family.name, "settings": self.settings.as_json()}
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(path, content | {"merged": counts, "J and utility on the tuning split": values})
        return best


# What came out


def brought_back(family: Outcomes, model: str) -> float:
    """The share of the lost J that a model has again; more than one where it stands above the aligned model."""
    aligned, before, after = (separation(sides(family, one))[0] for one in (ALIGNED, FINE_TUNED, model))
    return (after - before) / (aligned - before)


def merge_of(family: Outcomes, model: str) -> str:
    """What a model that is held against the aim is merged by, and whether that was chosen for its family alone."""
    if model == HALF:
        return f"λ = {family.head['choice']['lambda_']:g} on the lowest 50 %"
    return str(family.head["aims"][model]) + (", its own choice" if model == OWN else "")


def aim_table(held: Sequence[tuple[Outcomes, str]]) -> str:
    """Families with the model that is held against the aim.

    Args:
        held: (outcomes, label of the model).
    """
    rows = []
    for family, model in held:
        values = [separation(sides(family, one))[0] for one in (ALIGNED, FINE_TUNED, model)]
        change, interval, _ = separation_change(sides(family, model), sides(family, FINE_TUNED))
        skill = utility_change(family, model, FINE_TUNED)
        rows.append(
            [
                name_of(family),
                merge_of(family, model),
                *(f"{100 * value:.0f}" for value in values),
                f"{points(change)} ({span(interval)})",
                f"{100 * brought_back(family, model):.0f} %",
                "–" if skill is None else points(skill),
                "met" if reached(family, model) else "missed",
            ]
        )
    head = ["family", "merge", "J aligned", "fine-tuned", "merged", "change", "brought back", "utility", "aim"]
    return table(head, rows)


def aimed(outcomes: Sequence[Outcomes], aims: Sequence[Outcomes]) -> list[tuple[Outcomes, str]]:
    """Every family with the model that is held against the aim.

    Sums for which nothing was chosen take the demo's own choice, λ = 1 on the lowest half, which the comparisons score.
    """
    sums = [(one, HALF) for one in outcomes if one.head["family"]["task"] == "arithmetic"]
    held = sums + [(one, model) for model in (CHOSEN, OWN) for one in aims]
    found = {
        (name_of(one), model == OWN): (one, model)
        for one, model in held
        if all(scored(one, asked) for asked in (ALIGNED, FINE_TUNED, model))
    }
    return list(found.values())


def reached(family: Outcomes, model: str) -> bool:
    """Whether a model meets the aim, by its point estimates."""
    skill = utility_change(family, model, FINE_TUNED)
    return skill is not None and brought_back(family, model) >= SHARE and skill > -LOSS


def aims_met_by_model(held: Sequence[tuple[Outcomes, str]]) -> str:
    """How many models of reports reach the aim with the adapter of `PREFERRED`; empty where one is not scored."""
    found = [(family, model) for family, model in held if name_of(family) in PREFERRED]
    if len(found) < len(PREFERRED):
        return ""
    told = ", ".join(
        f"{name_of(family)} {100 * brought_back(family, model):.0f} % back for "
        f"{points(utility_change(family, model, FINE_TUNED) or 0)}"
        for family, model in found
    )
    return f"{sum(reached(*one) for one in found)} of {len(found)} ({told})"


def group_of(family: Outcomes, model: str) -> str:
    """The families that are told of together: those of a task and a kind of safety adapter, by whom was chosen for."""
    return name_of(family).split("-", 1)[1] + (", chosen for each family" if model == OWN else "")


def _groups(held: Sequence[tuple[Outcomes, str]]) -> dict[str, list[tuple[Outcomes, str]]]:
    found: dict[str, list[tuple[Outcomes, str]]] = {}
    for pair in held:
        found.setdefault(group_of(*pair), []).append(pair)
    return found


def aims_met(held: Sequence[tuple[Outcomes, str]]) -> str:
    """In how many families of each group the aim was met."""
    groups = _groups(held).items()
    return "; ".join(f"{group} {sum(reached(*one) for one in those)} of {len(those)}" for group, those in groups)


def summary(held: Sequence[tuple[Outcomes, str]]) -> str:
    """What came back on average, by task and by whom it was chosen for."""
    told = []
    for group, those in _groups(held).items():
        shares = [brought_back(*pair) for pair in those]
        skills = [change for one, model in those if (change := utility_change(one, model, FINE_TUNED)) is not None]
        spread = f"({100 * min(shares):.0f} to {100 * max(shares):.0f}) " if len(those) > 1 else ""
        where = f"{len(those)} families" if len(those) > 1 else "one family, which says nothing of others"
        told.append(
            f"{group}: {100 * fmean(shares):.0f} % {spread}of the lost J back, utility {points(fmean(skills))} points, "
            f"in {where}"
        )
    return "; ".join(told) + "."


def by_answer(held: Sequence[tuple[Outcomes, str]]) -> str:
    """The reports that are answered right, by their answer, before and after a merge; empty where none was asked."""
    rows = []
    for family, model in held:
        before, after = utility(family, FINE_TUNED), utility(family, model)
        if before is None or after is None or not all(key.startswith("qa/") for key in after):
            continue
        answers = {key: studies.make(int(key.removeprefix("qa/"))).answer for key in after}
        cells = [name_of(family), merge_of(family, model)]
        for answer in studies.ANSWERS:
            shares = (fmean(one[key] for key in after if answers[key] == answer) for one in (before, after))
            cells.append(" → ".join(f"{100 * share:.0f}" for share in shares))
        rows.append(cells)
    return table(["family", "merge", *(f"{answer}, right %" for answer in studies.ANSWERS)], rows) if rows else ""


def choices(folder: Path) -> str:
    """What was tried on the tuning split, by the families that a choice was made for; empty where nothing was."""
    rows = []
    for path in sorted(folder.glob("aim-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for label, (value, skill) in found["J and utility on the tuning split"].items():
            told = f"**{label}**" if label == found["chosen"] else label
            scope = path.stem.removeprefix("aim-")
            rows.append([scope, found["on"], told, "not asked" if value is None else f"{value:.0f}", f"{skill:.0f}"])
    return table(["chosen for", "on", "merge", "J", "right %"], rows) if rows else ""


def taught(aims: Sequence[Outcomes]) -> str:
    """What safety adapters of other rows make of the aligned model, by themselves; empty where none was asked."""
    rows = []
    for family in aims:
        if not scored(family, ALIGNED, TAUGHT):
            continue
        values = (f"{100 * separation(sides(family, model))[0]:.0f}" for model in (ALIGNED, TAUGHT))
        skills = (utility(family, model) for model in (ALIGNED, FINE_TUNED, TAUGHT))
        rows.append([name_of(family), *values, *(f"{100 * fmean(one.values()):.0f}" if one else "–" for one in skills)])
    head = ["family", "J aligned", "aligned + Δs", "right % aligned", "fine-tuned", "aligned + Δs"]
    return table(head, rows) if rows else ""
