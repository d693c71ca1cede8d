"""The four comparisons over families, and what goes with them: from outcomes to tables.

Which families a comparison may use, the pooled difference or rank, and the words that its numbers allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from benchmarks.study.analysis import FEWEST, Pooled, corrected, pooled, rank_p
from benchmarks.study.models import COMPARISONS, DRAW, GATED, PAPER, Comparison
from benchmarks.study.outcomes import LIKELIHOOD, Outcomes
from safemerge_recipes.evaluation.rates import Interval, mean_interval
from safemerge_recipes.evaluation.separation import Sides, auroc, auroc_change, separation_change
from safemerge_recipes.evaluation.statistics import MARGIN

CARRIED = 0.10
"""What Δs must add to J, so that a family counts where Δs is merged."""
DRAWS = 20
"""Random choices of a family that must all be measured, so that it counts in a comparison with them."""


def name_of(family: Outcomes) -> str:
    return str(family.head["family"]["name"])


def requests(family: Outcomes) -> tuple[str, ...]:
    tasks = family.head["tasks"]
    return (*tasks["harmful"], *tasks["harmless"])


def scored(family: Outcomes, *models: str) -> bool:
    """Whether models were asked everything."""
    return all(family.has(model, requests(family), "refusal") for model in models)


def sides(family: Outcomes, model: str, name: str = "refusal") -> Sides:
    """An outcome of all harmful and all harmless requests."""
    tasks = family.head["tasks"]
    return family.sides(model, name, tasks["harmful"], tasks["harmless"])


def carries(family: Outcomes) -> bool | None:
    """Whether the safety adapter passed the carry check; None: it was not made."""
    check = family.head.get("carry")
    return None if check is None else check["after"] - check["before"] >= CARRIED


def drawn(family: Outcomes) -> list[str]:
    """The random choices that were measured."""
    labels = dict.fromkeys(model for model, _ in family.models if model.startswith(f"{DRAW} "))
    return [label for label in labels if family.has(label, requests(family), LIKELIHOOD)]


def fit(comparison: Comparison, families: Sequence[Outcomes]) -> list[Outcomes]:
    """The families that a comparison can use: scored, with all its random draws or a safety adapter that carries."""
    found = []
    for family in families:
        if comparison.this != GATED and not carries(family):
            continue
        wanted = [comparison.this] if comparison.against is None else [comparison.this, comparison.against]
        if scored(family, *wanted) and (comparison.against is not None or len(drawn(family)) >= DRAWS):
            found.append(family)
    return found


# The four comparisons


def points(value: float, digits: int = 1) -> str:
    return f"{100 * value:+.{digits}f}".replace("-", "−")


def span(interval: Interval, digits: int = 1) -> str:
    if not all(map(math.isfinite, interval)):
        return "–"
    return f"{points(interval[0], digits)} to {points(interval[1], digits)}"


def verdict(found: Pooled, p: float) -> str:
    """The finding of a comparison in words."""
    if p < 0.05:
        return "**better**" if found.mean > 0 else "**worse**"
    return "equivalent within 5 points" if found.equivalent else "not told apart"


def ranked(families: Sequence[Outcomes]) -> dict[str, tuple[float, list[float]]]:
    """Family -> (AUROC of the paper's merge, of its random draws)."""
    return {
        name_of(one): (
            auroc(sides(one, PAPER, LIKELIHOOD))[0],
            [auroc(sides(one, label, LIKELIHOOD))[0] for label in drawn(one)],
        )
        for one in families
    }


def comparisons(families: Sequence[Outcomes]) -> str:
    """The four comparisons as a table."""
    usable = {one.letter: fit(one, families) for one in COMPARISONS}
    differences = {
        one.letter: pooled({name_of(f): (sides(f, one.this), sides(f, one.against)) for f in usable[one.letter]})
        for one in COMPARISONS
        if one.against is not None and len(usable[one.letter]) > 1
    }
    p_values = {letter: found.p for letter, found in differences.items()}
    ranks = ranked(usable["B"])
    if ranks:
        p_values["B"] = rank_p(ranks)
    holm = corrected(dict(sorted(p_values.items())))
    rows = []
    for one in COMPARISONS:
        own = usable[one.letter]
        if one.against is None:
            rows.append([f"**{one.letter}** {one.question}", len(own), *_rank_cells(ranks, holm)])
        elif one.letter in differences:
            found = differences[one.letter]
            cells = [points(found.mean), span(found.interval), span(found.bootstrap)]
            cells += [f"{found.p:.3f}", f"{holm[one.letter]:.3f}", verdict(found, holm[one.letter])]
            rows.append([f"**{one.letter}** {one.question}", len(own), *cells])
        else:
            rows.append([f"**{one.letter}** {one.question}", len(own), *_single(one, own)])
    head = ["comparison", "families", "J, points", "95 %, over families", "bootstrap", "p", "Holm", "finding"]
    return table(head, rows)


def _rank_cells(ranks: Mapping[str, tuple[float, Sequence[float]]], holm: Mapping[str, float]) -> list[str]:
    if not ranks:
        return ["–"] * 5 + ["not run"]
    beaten = [sum(chosen > draw for draw in draws) / len(draws) for chosen, draws in ranks.values()]
    above = [chosen - fmean(draws) for chosen, draws in ranks.values()]
    found = "**better**" if holm["B"] < 0.05 else "not told apart"
    told = f"AUROC {fmean(above):+.3f}, beats {100 * fmean(beaten):.0f} % of the draws"
    spread = "{:+.3f} to {:+.3f} of AUROC".format(*mean_interval(above)) if len(above) > 1 else "–"
    return [told.replace("-", "−"), spread.replace("-", "−"), "–", f"{rank_p(ranks):.3f}", f"{holm['B']:.3f}", found]


def _single(one: Comparison, own: Sequence[Outcomes]) -> list[str]:
    """Cells of a comparison with one family or none: nothing to be said of others."""
    if not own or one.against is None:
        return ["–"] * 5 + ["not run"]
    value, interval, p = separation_change(sides(own[0], one.this), sides(own[0], one.against))
    return [points(value), f"{span(interval)}, over prompts", "–", f"{p:.3f}", "–", "one family says nothing of others"]


# Beside J


def beside(families: Sequence[Outcomes]) -> str:
    """AUROC, both rates, degenerate answers and utility of the comparisons, means over families with t-intervals."""
    rows = []
    for one in COMPARISONS:
        if one.against is None:
            continue
        own = fit(one, families)
        if len(own) < 2:
            continue
        curves = [
            auroc_change(sides(f, one.this, LIKELIHOOD), sides(f, one.against, LIKELIHOOD))[0]
            for f in own
            if all(f.has(model, requests(f), LIKELIHOOD) for model in (one.this, one.against))
        ]
        cells = [f"{one.this} against {one.against}", _mean(curves, 3, 1) if len(curves) > 1 else "–"]
        for side in ("harmful", "harmless"):
            rates = [rate(f, one.this, side) - rate(f, one.against, side) for f in own]
            cells.append(_mean(rates, 1, 100))
        skills = [change for f in own if (change := utility_change(f, one.this, one.against)) is not None]
        cells.append(_mean(skills, 1, 100) if len(skills) > 1 else "–")
        lower = mean_interval(skills)[0] if len(skills) >= FEWEST else -math.inf
        cells.append("yes" if lower > -MARGIN else "not shown")
        rows.append(cells)
    head = ["", "AUROC", "refuses harmful", "refuses harmless", "utility", "utility not inferior by 5"]
    return table(head, rows) if rows else "Fewer than two families are scored."


def changes(families: Sequence[Outcomes]) -> str:
    """A, C and D of each family by itself, with intervals over its prompts."""
    rows = []
    for family in families:
        for one in COMPARISONS:
            if one.against is None or not scored(family, one.this, one.against):
                continue
            this, against = sides(family, one.this), sides(family, one.against)
            value, interval, p = separation_change(this, against)
            skill = utility_change(family, one.this, one.against)
            curve = auroc_change(*(sides(family, model, LIKELIHOOD) for model in (one.this, one.against)))[0]
            cells = [f"**{one.letter}** {one.question}", points(value), span(interval), f"{p:.3f}"]
            cells += [f"{curve:+.3f}".replace("-", "−"), "–" if skill is None else points(skill)]
            rows.append([name_of(family), *cells])
    head = ["family", "comparison", "J, points", "95 %, over prompts", "p", "AUROC", "utility"]
    return table(head, rows)


def _mean(values: Sequence[float], digits: int, times: float) -> str:
    mean, low, high = (
        f"{times * one:+.{digits}f}".replace("-", "−") for one in (fmean(values), *mean_interval(values))
    )
    return f"{mean} ({low} to {high})"


def rate(family: Outcomes, model: str, side: str, name: str = "refusal") -> float:
    return fmean(getattr(sides(family, model, name), side).values())


def utility(family: Outcomes, model: str) -> dict[str, float] | None:
    """Whether each question of the task was answered right."""
    task = family.head["tasks"]["utility"]
    return family.values(model, task, "acc") if family.has(model, [task], "acc") else None


def utility_change(family: Outcomes, this: str, against: str) -> float | None:
    """The difference in utility on the same questions."""
    one, other = utility(family, this), utility(family, against)
    if one is None or other is None:
        return None
    return fmean(value - other[key] for key, value in one.items())


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    columns: list[object] = [*head]
    marks: list[object] = ["---", *["---:" for _ in columns[1:]]]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in (columns, marks, *rows))
