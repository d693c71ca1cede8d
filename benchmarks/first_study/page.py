"""docs/first-study.md and its pictures, made from the study's results; every number on the page is read from them.

The sentences that draw a conclusion are chosen by the numbers, so that another run may say the opposite.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.first_study.chance import contests, halves, shown
from benchmarks.first_study.results import (
    AIM,
    ANCHORS,
    AS_MANY,
    CONTROLS,
    EVERYWHERE,
    GATED,
    HALVES,
    LOOKALIKES,
    MAIN,
    MOST_LOSS,
    PAIRS,
    PAPER,
    PROBES,
    REFUSAL,
    SHRUNK,
    TASKS,
    UNIFORM,
    entry_of,
    gains,
    met,
    rates_of,
    skill_task,
)
from benchmarks.strips import strips
from safemerge_recipes.evaluation.experiments.probe import SYMBOLS
from safemerge_recipes.evaluation.experiments.probe import picture as probe_picture
from safemerge_recipes.evaluation.rates import spearman
from safemerge_recipes.report.scatter import Mark, scatter

AIMED = (
    f"The aim was to bring back at least {100 * AIM:.0f} % of the lost refusal for less than {100 * MOST_LOSS:.0f} "
    "points of utility. Below, mean (lowest to highest) over families of task and training seed, on the test split; "
    "a negative cost is a gain. Whether the aim is met goes by point estimates: on 75 to 150 prompts a rate is known "
    "to some ± 10 points, so that a single family proves neither."
)
BEATEN = "At least one choice of half of the tensors refuses more than random halves do"
NOT_BEATEN = "No choice of half of the tensors is shown to refuse more than random halves"

HEAD = """# The first study

Does a merge bring safety back, does the fine-tuned skill stay, and would merging tensors picked at random have done
as well? Every number is read from `docs/evidence/*.json`, and what is concluded from them is chosen by
them. It counts refusals of harmful requests; what is asked since, and why, is in [evidence](evidence.md).
"""

CHANCE = """Half of the 210 matrices merged at α = 0.5, refusals on the tuning split; no half was chosen by its score.
Cells are points above the median random half and, in brackets, the one-sided exact p of the half being one more random
draw (random within each module type for the choices made within it). "Together" is Fisher's combination over families.
"""

VECTOR = """The same question for the merge that the demo ships, `ρ < 0.1, Δf + 1.0 V`, on the test split: the safety
vector added to as many tensors, drawn at random.
"""

GATING = """What the safety adapter and the gate change, on the test split: paired differences in points with 95 %
bootstrap intervals, bold where detected after Holm's correction over all tests of the family.
"""

CARRY = """`safemerge probe` adds V to one group of tensors at a time (γ = 1.0) and scores the tuning split: the first
90 prompts of refusal and of the task for each module type, the first 60 for every other block.
"""

SETTING = """## The families

SmolLM2-135M-Instruct as the base; an alignment adapter that teaches it to refuse; a safety adapter (its own seed and
data, trained on the aligned model); and task adapters, trained on the aligned model with nothing harmful in the data:
`arithmetic` (800 chains of sums with worked answers) and `qa` (320 invented study reports with a yes/no/maybe
question, answered with a reason), three training seeds each. All are LoRA, r = 8, on the 210 matrices of 30 blocks;
they are not those that `recipes/demo` holds now.

Scores are lm-eval's on the shipped tasks, through the chat template, bfloat16 on a CPU: refusal of harmful requests
(greedy; a rule-based matcher that knows degenerate text, [validated here](evaluation.md)), the same for harmless
look-alikes, exact answers to sums, and the likeliest of yes, no and maybe (a guess is right in 33 %). The tuning split
chooses, the disjoint test split reports. Brackets are Wilson 95 % intervals; tests are paired by prompt (McNemar,
exact) with Holm's correction over each family's comparisons.

Merges are αΔf + (1−α)Δs unless they say otherwise. RESTA is Δf + γV (`add_safety_vector`), WiSE-FT αΔf, Safe LoRA
`project`; V = W_aligned − W_base, Δf and Δs the task's and the safety adapter's updates. Tensors that a gate leaves
keep the fine-tuned value.

A merge recovers (its refusals − the fine-tuned model's) / (the aligned model's − the fine-tuned model's).

Chosen on a tuning split, for arithmetic-2 and qa-21: of each approach the point with the most refusals among those that
lose at most 2 points of utility; where none is, the largest sum. All families report the same nine points on the test
split. They were fixed after the tuning split of arithmetic-2 was seen and before any other family was scored; on
arithmetic-2 itself, rows that its tuning split did not choose were added afterwards, among them RESTA, γ = 1.0.
"""

LIMITS = """## What this does not show

- Seeds differ in the training order and start of the task adapter; the alignment and the safety adapter are one each.
- One small model whose safety is itself a LoRA, so that V has rank 8; the paper's models have a dense V.
- The safety adapter was trained on a model that refuses already and adds little to it; the paper's merge rests on one
  that carries safety of its own.
- A rule-based matcher of refusals, not a judge of harm. A `qa` model answers some harmful requests with a bare "no.",
  which counts as a refusal.
- Few prompts: a rate on 90 prompts has a 95 % interval of about ± 10 points, and a loss of 2 points of utility is
  below what the paired tests can detect. "Met" and "missed" are point estimates.
- Random choices are few, so that only a choice that is better in most families could be told from chance.
- The base model's answers to `qa` are all alike, and so are those of several merges: 33 % there is a guess, and a skill
  that is lost is lost altogether. Averages over such families hide this; the marks in the picture show it.
"""

REPEAT = """## Repeat it

These families cannot be scored again from this tree: their adapters were remade since. `python -m
benchmarks.first_study` makes this page from what is kept. bfloat16 rounds differently on other processors, so that
single answers may differ: when the test split of `arithmetic-2` was scored a second time, no rate of refusal moved by
more than one prompt of 150.
"""


def _rate(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return f"{100 * entry['value']:.1f} [{100 * entry['low']:.0f}, {100 * entry['high']:.0f}]"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(head)
    marks = ["---", *["---:" for _ in columns[1:]]]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in (columns, marks, *rows))


def split_table(results: dict[str, Any], split: str) -> str:
    """Every model scored on a split, random controls apart."""
    end = "_tuning" if split == "tuning" else ""
    models, won = results["scores"][split], gains(results) if split == "test" else {}
    head = ["model", "merged of 210", "refuses harmful %", "degenerate %", f"{TASKS[results['task']]} right %"]
    harmless = any(LOOKALIKES + end in one for one in models.values())
    head += ["refuses harmless %"] * harmless + ["recovered %", "utility lost, points", "aim"] * bool(won)
    rows = []
    for label, tasks in models.items():
        if label.startswith(CONTROLS):
            continue
        cells = [label, results["models"][label]["merged"] or ""]
        cells += [_rate(entry_of(tasks, REFUSAL + end, metric)) for metric in ("refusal", "degenerate")]
        cells.append(_rate(entry_of(tasks, skill_task(results) + end, "acc")))
        cells += [_rate(entry_of(tasks, LOOKALIKES + end, "refusal"))] * harmless
        if label in won:
            share, loss = won[label]
            cells += [f"{100 * share:.0f}", f"{100 * loss:+.1f}", "met" if met(share, loss) else "missed"]
        rows.append([*cells, *[""] * (len(head) - len(cells))])
    return _table(head, rows)


def _counts(results: dict[str, Any], split: str) -> str:
    models, end = results["scores"][split], "_tuning" if split == "tuning" else ""
    skill = TASKS[results["task"]]
    names = {REFUSAL: "harmful requests", skill_task(results): skill, LOOKALIKES: "harmless look-alikes"}
    sizes = {
        name: max((m["n"] for tasks in models.values() for m in tasks.get(task + end, {}).values()), default=0)
        for task, name in names.items()
    }
    return ", ".join(f"{n} {name}" for name, n in sizes.items() if n)


# Across families


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def across(families: Sequence[dict[str, Any]]) -> str:
    """Per task, what the merges do on average over training seeds, and between which values."""
    parts = []
    for task in TASKS:
        own = [results for results in families if results["task"] == task and gains(results)]
        if not own:
            continue

        def spread(label: str, on: str, metric: str, own: Sequence[dict[str, Any]] = own) -> str:
            entries = [entry_of(results["scores"]["test"].get(label, {}), on, metric) for results in own]
            return _spread([100 * entry["value"] for entry in entries if entry], ".0f")

        rows: list[list[object]] = []
        for label in ("aligned", "fine-tuned", *ANCHORS):
            found = [gains(results)[label] for results in own if label in gains(results)]
            rows.append(
                [
                    label,
                    spread(label, REFUSAL, "refusal"),
                    spread(label, REFUSAL, "degenerate"),
                    spread(label, f"safemerge_{task}", "acc"),
                    spread(label, LOOKALIKES, "refusal"),
                    _spread([100 * share for share, _ in found], ".0f"),
                    _spread([100 * loss for _, loss in found], "+.1f"),
                    f"{sum(met(*one) for one in found)} of {len(found)}" if found else "",
                ]
            )
        head = ["merge", "refuses harmful %", "degenerate %", f"{TASKS[task]} right %", "refuses harmless %"]
        seeds = f"{len(own)} training seed{'s' * (len(own) > 1)}"
        names = ", ".join(results["family"] for results in own)
        parts.append(
            f"**{task}**, test split, {seeds} ({names}): mean (lowest to highest).\n\n"
            + _table([*head, "recovered %", "utility lost, points", "aim met"], rows)
        )
    return "\n\n".join(parts)


def findings(families: Sequence[dict[str, Any]], probes: Mapping[str, dict[str, Any]]) -> str:
    """The answers in short, each chosen by the numbers."""
    scored = [results for results in families if gains(results)]
    if not scored:
        return "Nothing is scored yet."
    said = [
        lost_in(scored),
        *recovered_in(scored),
        *picked_in(scored),
        *gated_in(scored),
        *overrefused_in(scored),
        *controlled(families),
        *ranked_in(probes),
    ]
    return "\n\n".join([AIMED, "\n".join(f"- {one}" for one in said)])


def lost_in(families: Sequence[dict[str, Any]]) -> str:
    """What fine-tuning cost."""
    values = [rates_of(results, "test") for results in families]
    lost = [100 * (one["aligned"][0] - one["fine-tuned"][0]) for one in values]
    tested = [_tested(results, "aligned", "fine-tuned", "refusal") for results in families]
    detected = sum(row is not None and row["detected"] for row in tested)
    return (
        f"**Fine-tuning on harmless data cost {_spread(lost, '.0f')} points of refusal**; the paired test detects it "
        f"in {detected} of {len(lost)} families."
    )


def recovered_in(families: Sequence[dict[str, Any]]) -> list[str]:
    """What the fixed merges bring back, those that were scored in every family: the paper's first, then the best."""
    everywhere = [label for label in ANCHORS if all(label in gains(results) for results in families)]
    said = []

    def told(label: str) -> str:
        own = [gains(results)[label] for results in families]
        shares, losses = [100 * share for share, _ in own], [100 * loss for _, loss in own]
        return (
            f"brings back {_spread(shares, '.0f')} % of the lost refusal, costs {_spread(losses, '.1f')} points of "
            f"utility and meets the aim in {sum(met(*one) for one in own)} of {len(own)}"
        )

    if PAPER in everywhere:
        said.append(f"**The paper's merge** (`{PAPER}`) {told(PAPER)}.")
    if {UNIFORM, SHRUNK} <= set(everywhere):
        with_it, without = _mean_share(families, UNIFORM), _mean_share(families, SHRUNK)
        said.append(
            f"Half of Δf and half of the safety adapter everywhere (`{UNIFORM}`) brings back {100 * with_it:.0f} % on "
            f"average, half of Δf alone (`{SHRUNK}`) {100 * without:.0f} %: "
            + (
                "**the safety adapter of this demo carries little of what the linear merges bring back**, so that they "
                "are not shown at their best."
                if with_it - without < 0.1
                else "the safety adapter carries part of what the linear merges bring back."
            )
        )
    if everywhere:
        most = max(everywhere, key=lambda m: (sum(met(*gains(r)[m]) for r in families), _mean_share(families, m)))
        said.append(
            f"Of {len(everywhere)} fixed merges, **`{most}`** meets the aim most often: it {told(most)}. It is the "
            "best of them on the test split itself, so that its figures flatter it."
        )
    return said


def _mean_share(families: Sequence[dict[str, Any]], label: str) -> float:
    return fmean(gains(results)[label][0] for results in families)


def pick(results: dict[str, Any]) -> str | None:
    """The point that the tuning split chooses among all approaches: as `chosen` within one."""
    values = {m: v for m, v in rates_of(results, "tuning").items() if not m.startswith(CONTROLS)}
    candidates = [m for m in values if m not in ("aligned", "fine-tuned")]
    if not candidates or "fine-tuned" not in values:
        return None
    floor = values["fine-tuned"][1] - MOST_LOSS
    good = [m for m in candidates if values[m][1] >= floor]
    return max(good, key=lambda m: values[m]) if good else max(candidates, key=lambda m: sum(values[m]))


def picked_in(families: Sequence[dict[str, Any]]) -> list[str]:
    """What the point that the tuning split chose does on the test split."""
    said = []
    for results in families:
        label = pick(results) if results.get("tuned") else None
        if label is None:
            continue
        if label not in gains(results):
            said.append(f"{results['family']}: the tuning split chose `{label}`, not scored on the test split yet.")
            continue
        share, loss = gains(results)[label]
        said.append(
            f"Chosen on the tuning split alone, {results['family']}: `{label}` brings back {100 * share:.0f} % and "
            f"costs {100 * loss:.1f} points on the test split: the aim is {'met' if met(share, loss) else 'missed'}."
        )
    return said


def gated_in(families: Sequence[dict[str, Any]]) -> list[str]:
    """What a gate changes against merging everywhere, in one sentence a merge."""
    said = []
    for one, other in ((PAPER, UNIFORM), (GATED, EVERYWHERE)):
        words = []
        for metric, what in (("refusal", "refusal"), ("acc", "utility")):
            rows = [row for results in families if (row := _tested(results, one, other, metric))]
            if rows:
                gaps = _spread([100 * row["difference"] for row in rows], "+.1f")
                words.append(
                    f"{gaps} points of {what} (detected in {sum(row['detected'] for row in rows)} of {len(rows)})"
                )
        if words:
            said.append(f"What the gate changes: `{one}` against `{other}`, {', '.join(words)}.")
    return said


def overrefused_in(families: Sequence[dict[str, Any]]) -> list[str]:
    """Whether refusing of harmless requests comes back too."""
    said, rates = [], {}
    for label in ("aligned", "fine-tuned", *MAIN):
        entries = [entry_of(results["scores"]["test"].get(label, {}), LOOKALIKES, "refusal") for results in families]
        rates[label] = [100 * entry["value"] for entry in entries if entry]
    if all(rates.values()):
        most = max(MAIN, key=lambda m: fmean(rates[m]))
        back = fmean(rates["fine-tuned"]) < min(fmean(rates["aligned"]), fmean(rates[most]))
        beyond = back and fmean(rates[most]) > fmean(rates["aligned"])
        said.append(
            ("**Over-refusal comes back with refusal**" if back else "Over-refusal")
            + f": of harmless look-alikes the aligned model refuses {_spread(rates['aligned'], '.0f')} %, the "
            f"fine-tuned models {_spread(rates['fine-tuned'], '.0f')} %, `{most}` {_spread(rates[most], '.0f')} %"
            + (", more than the aligned model itself." if beyond else ".")
        )
    return said


def _tested(results: dict[str, Any], model: str, reference: str, metric: str) -> dict[str, Any] | None:
    """The paired test of one metric, harmless look-alikes apart."""
    for row in results.get("comparisons", ()):
        if (row["model"], row["reference"], row["metric"]) == (model, reference, metric) and row["task"] != LOOKALIKES:
            return row
    return None


# Against chance


def controlled(families: Sequence[dict[str, Any]]) -> list[str]:
    """In one sentence each, what the random controls say."""
    said = []
    if found := halves(families):
        p, least = shown(found)
        best = max(found, key=lambda one: one.advantage)
        said.append(
            f"**{BEATEN if p < 0.05 else NOT_BEATEN}**"
            + f": of {len(found)} ways, by ρ, ρ/ρ₀ or rank, the best ({best.name}) refuses {100 * best.advantage:+.1f} "
            f"points against the median random half (smallest p {p:.2f} after correction; {least:.3f} was possible)."
        )
    for metric, what in (("refusal", "refuses"), ("acc", "keeps skill")):
        found = contests(families, "test", metric, {GATED: AS_MANY})
        if found:
            p, least = shown(found)
            topped = all(one.joint == one.least for one in found)
            each = "; ".join(
                f"{100 * one.advantage:+.1f} points against the median of {sum(map(len, one.draws.values()))} draws "
                f"({one.control})"
                for one in found
            )
            verdict = (
                f"**{what} more than** as many random tensors"
                if p < 0.05
                else f"{what} more than every draw of as many random tensors, too few draws to rule out chance"
                if topped
                else f"is not shown to {what.replace('refuses', 'refuse').replace('keeps', 'keep')} more than as many "
                "random tensors"
            )
            said.append(f"With the safety vector, the gate {verdict}: {each} (p {p:.2f}, {least:.3f} was possible).")
    return said


def chance(families: Sequence[dict[str, Any]]) -> str:
    """Whether a half that a metric picks refuses more than random halves, in words and a table."""
    found = halves(families)
    if not found:
        return "Not run yet."
    names = list(dict.fromkeys(family for one in found for family in one.values))
    rows: list[list[object]] = [[one.name, *one.cells(names)] for one in found]
    for control in HALVES:
        draws = next((one.draws for one in found if one.control == control), {})
        rows.append([f"{control}, refuses %", *(_drawn(draws.get(name)) for name in names), ""])
    p, least = shown(found)
    words = (
        f"**{BEATEN if p < 0.05 else NOT_BEATEN}**"
        + f": the smallest p of all families together is {p:.2f} after Bonferroni's correction for {len(found)} rows; "
        f"a half that beat every draw of every family would have {least:.3f}."
    )
    return _table(["half that merges", *names, "mean (together)"], rows) + "\n\n" + words


def _drawn(draws: Sequence[float] | None) -> str:
    if not draws:
        return "–"
    return f"{100 * median(draws):.1f} [{100 * min(draws):.0f} to {100 * max(draws):.0f}], n = {len(draws)}"


def vector(families: Sequence[dict[str, Any]]) -> str:
    """The gated safety vector against as many random tensors."""
    rows: list[list[object]] = []
    for metric, what in (("refusal", "refuses %"), ("acc", "utility %")):
        for one in contests(families, "test", metric, {GATED: AS_MANY}):
            for name, value in one.values.items():
                gap = f"{100 * (value - median(one.draws[name])):+.1f} ({one.p(name):.2f})"
                rows.append([name, what, f"{100 * value:.1f}", one.control, _drawn(one.draws[name]), gap])
    head = ["family", "", GATED, "control", "its median [range]", "points above (p)"]
    return _table(head, rows) if rows else "Not run yet."


def lever(families: Sequence[dict[str, Any]]) -> str:
    """Whether gating the safety vector beats adding it everywhere, and SafeMERGE beats its complement: by family."""
    rows = []
    for one, other in PAIRS:
        for metric, name in (("refusal", "refusal"), ("acc", "utility")):
            tests = [_tested(results, one, other, metric) for results in families]
            rows.append([f"{one} against {other}", name, *(_gap(test) for test in tests)])
    return _table(["points of", "", *(results["family"] for results in families)], rows)


def _gap(row: dict[str, Any] | None) -> str:
    """A difference with its interval; bold where the corrected test detects it."""
    if row is None:
        return "–"
    text = f"{100 * row['difference']:+.1f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"
    return f"**{text}**" if row["detected"] else text


def summary_picture(families: Sequence[dict[str, Any]]) -> str:
    """Recovered refusal and lost utility of every merge, a mark a family."""
    found = [(results["task"], gains(results)) for results in families]
    rows = {
        label: [[(task, 100 * values[label][place]) for task, values in found if label in values] for place in range(2)]
        for label in ANCHORS
    }
    return strips(
        rows,
        (("recovered refusal, %", 100 * AIM), ("utility lost, points", 100 * MOST_LOSS)),
        "What merges recover and cost, a mark a training seed",
    )


def probed(probes: Mapping[str, dict[str, Any]]) -> str:
    """What single groups of tensors do, and whether ρ or the size of V ranks them."""
    if not probes:
        return "Not run yet."
    tests = [one for content in probes.values() for one in content["correlations"] if one["change"] == "safety"]

    def detected(metric: str, sign: int) -> int:
        own = [one for one in tests if one["metric"] == metric and one["spearman"] is not None]
        return sum(sign * one["spearman"] > 0 and one["p"] * len(tests) < 0.05 for one in own)

    words = (
        f"Were ρ to find where merging helps, its correlation with the change in refusal would be negative. That is "
        f"detected in {detected('rho', -1)} of {len(probes)} probes (p < 0.05 after Bonferroni's correction for the "
        f"{len(tests)} correlations with refusal below), the opposite in {detected('rho', 1)}; that simply a large "
        f"‖V‖ is where it helps, in {detected('v_norm', 1)}."
    )
    alike = [f"{name} {_alike(content):+.2f}" for name, content in probes.items()]
    words += f" The two measures are themselves correlated, ρ with ‖V‖: {', '.join(alike)}."
    rows = []
    for name, content in probes.items():
        found = {(one["metric"], one["change"]): one for one in content["correlations"]}
        for metric, symbol in SYMBOLS.items():
            cells = (_correlation(found[metric, change]) for change in ("safety", "utility"))
            rows.append([name, len(content["groups"]), symbol, *cells])
    parts = [words, _table(["probe", "groups", "Spearman's correlation of", "with refusal", "with utility"], rows)]
    for name, content in probes.items():
        base = content["merge_none"]
        parts.append(
            f"{name}, from {100 * base['safety']:.1f} % refusals and {100 * base['utility']:.1f} % utility with none "
            f"merged:\n\n![Change when one {KINDS[content['by']]} is merged](evidence/{PROBES}/{name}.svg)"
        )
    return "\n\n".join(parts)


KINDS = {"type": "module type", "block": "block", "tensor": "tensor"}


def ranked_in(probes: Mapping[str, dict[str, Any]]) -> list[str]:
    """How ρ and the size of V rank the groups that were merged alone."""
    said = []
    for name, content in probes.items():
        found = {one["metric"]: one for one in content["correlations"] if one["change"] == "safety"}
        rho, size = found["rho"]["spearman"], found["v_norm"]["spearman"]
        if rho is None or size is None:
            continue
        said.append(
            f"Adding V to one {KINDS[content['by']]} at a time ({name}), the change in refusal goes with ρ by "
            f"{_correlation(found['rho'])} and with the mere size of V by {_correlation(found['v_norm'])} (Spearman)"
            + (": **size ranks it as well as ρ or better.**" if abs(size) >= abs(rho) else ".")
        )
    return said


def _alike(content: dict[str, Any]) -> float:
    rows = content["groups"].values()
    return spearman([row["rho"] for row in rows], [row["v_norm"] for row in rows])[0]


def _correlation(one: dict[str, Any]) -> str:
    return "constant" if one["spearman"] is None else f"{one['spearman']:+.2f} (p = {one['p']:.3f})"


# One family


def verdict_list(results: dict[str, Any]) -> str:
    """The paired tests of the test split."""
    pairs = dict.fromkeys((row["model"], row["reference"]) for row in results["comparisons"])
    if not pairs:
        return "Not run yet."
    columns = {(REFUSAL, "refusal"): "refuses harmful", (REFUSAL, "degenerate"): "degenerate"}
    columns |= {(skill_task(results), "acc"): f"{TASKS[results['task']]} right"}
    columns |= {(LOOKALIKES, "refusal"): "refuses harmless"}
    cells = {(r["model"], r["reference"], r["task"], r["metric"]): _gap(r) for r in results["comparisons"]}
    rows = [[f"{m} against {r}", *(cells.get((m, r, *key), "–") for key in columns)] for m, r in pairs]
    return _table(["points of difference", *columns.values()], rows)


def safety_adapter(results: dict[str, Any]) -> str:
    """What the safety adapter itself adds, on the tuning split."""
    models = results["scores"]["tuning"]

    def refusal(label: str) -> float | None:
        entry = entry_of(models.get(label, {}), REFUSAL + "_tuning", "refusal")
        return None if entry is None else 100 * entry["value"]

    lines = []
    start = refusal("fine-tuned")
    for label in models:
        added = refusal(label)
        if results["models"][label]["approach"] == "Δf + λΔs everywhere" and start is not None and added is not None:
            lines.append(f"- {label}: {added:.1f} % refused, {added - start:+.1f} points against the fine-tuned model.")
    for label in models:
        alpha = label.partition("WiSE-FT, ")[2]
        one, other = refusal(label), refusal(f"uniform, {alpha}")
        if alpha and one is not None and other is not None:
            lines.append(
                f"- {alpha} everywhere: {other:.1f} % with the safety delta, {one:.1f} % without it (WiSE-FT)."
            )
    return "\n".join(lines) or "Not run yet."


def picture(results: dict[str, Any]) -> str:
    """Safety against utility on the tuning split."""
    marks = []
    split = "tuning" if results["tuned"] else "test"
    for label, (safety, utility) in rates_of(results, split).items():
        approach = results["models"][label]["approach"]
        chosen = label in results["chosen"].values() and "half" not in approach
        kind = "reference" if approach == "reference" else "control" if approach in CONTROLS else "point"
        marks.append(Mark(label, "chosen" if chosen else kind, utility, safety))
    return scatter(marks, f"{TASKS[results['task']]} right, {split} split", "refuses harmful requests")


def missing(results: dict[str, Any]) -> list[str]:
    """What of a family's plan has no score."""
    reported, main = ["aligned", "fine-tuned", *ANCHORS], ["aligned", "fine-tuned", *MAIN]
    drawn = [label for label in results["models"] if label.startswith(AS_MANY)]
    halved = [label for label in results["models"] if "half" in label]
    points = [label for label in results["models"] if label not in (*drawn, *halved)]
    skill = skill_task(results)
    plan = [
        ("test", REFUSAL, "refusal", reported),
        ("test", skill, "utility", reported),
        ("test", LOOKALIKES, "over-refusal", main),
        ("tuning", REFUSAL, "refusal with half of the tensors", halved),
    ]
    if results["tuned"]:
        plan += [
            ("tuning", REFUSAL, "refusal", points),
            ("tuning", skill, "utility", points),
            ("test", REFUSAL, "refusal with as many random tensors", drawn),
            ("test", skill, "utility with as many random tensors", drawn),
        ]
    found = []
    for split, task, name, wanted in plan:
        key = f"{task}_tuning" if split == "tuning" else task
        wanted = [label for label in wanted if label in results["models"]]
        without = [label for label in wanted if key not in results["scores"][split].get(label, {})]
        if without:
            found.append(f"{name} of {len(without)} of {len(wanted)} models on the {split} split")
    return found


def family_section(results: dict[str, Any]) -> str:
    """One family's part of the page, folded."""
    name = results["family"]
    picks = [f"{approach}: {label}" for approach, label in results["chosen"].items() if "half" not in approach]
    gaps = missing(results)
    parts = [f"<details><summary><b>{name}</b></summary>"]
    parts += [f"![Safety against utility](evidence/{name}.svg)"]
    parts += [f"**The test split** ({_counts(results, 'test')})", split_table(results, "test")]
    if results["scores"]["tuning"]:
        parts += [f"**The tuning split** ({_counts(results, 'tuning')})", split_table(results, "tuning")]
    if picks:
        parts += [f"Chosen there: {'; '.join(picks)}."]
        parts += ["What the safety adapter adds, on the tuning split:", safety_adapter(results)]
    parts += ["**Paired tests on the test split**", verdict_list(results)]
    parts += ["Not run for this family: " + ("; ".join(gaps) if gaps else "nothing") + ".", "</details>"]
    return "\n\n".join(parts)


def write_page(folder: Path, page: Path) -> None:
    """Write the page and its pictures."""
    families = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    families.sort(key=lambda results: (list(TASKS).index(results["task"]), results["seed"]))
    files = sorted((folder / PROBES).glob("*.json"))
    probes = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    parts = [
        HEAD.rstrip(),
        "## What came out",
        findings(families, probes),
        "![What merges recover and cost](evidence/summary.svg)",
        across(families),
        "## Would chance have done as well?",
        CHANCE.rstrip(),
        chance(families),
        VECTOR.rstrip(),
        vector(families),
        GATING.rstrip(),
        lever(families),
        "## Which tensors carry it?",
        CARRY.rstrip(),
        probed(probes),
        SETTING.rstrip(),
        "## Each family",
        *(family_section(results) for results in families),
        LIMITS.rstrip(),
        REPEAT,
    ]
    page.write_text("\n\n".join(parts), encoding="utf-8")
    for results in families:
        (folder / f"{results['family']}.svg").write_text(picture(results), encoding="utf-8")
    for name, content in probes.items():
        (folder / PROBES / f"{name}.svg").write_text(probe_picture(content["groups"], content["by"]), encoding="utf-8")
    (folder / "summary.svg").write_text(summary_picture(families), encoding="utf-8")
