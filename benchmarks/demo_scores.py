"""The scores behind README's table of the demo: the outcome of every prompt, as JSON lines that ship.

    make demo && python -m benchmarks.demo_scores recipes/demo/out/smollm2-135m-arithmetic-safe

writes docs/evidence/demo.jsonl, in the form of the study's outcomes and without answers, and prints the table that
README has to show.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from benchmarks.study.findings import requests, sides, table, utility
from benchmarks.study.outcomes import LIKELIHOOD, Outcomes, read
from safemerge_recipes.engine.folder import SCORES_FILE
from safemerge_recipes.engine.manifest import sha256_of
from safemerge_recipes.evaluation.compare import read_scores
from safemerge_recipes.evaluation.rates import Interval, paired_rates, wilson
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.separation import auroc, separation, separation_change

FILE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "demo.jsonl"
COLUMNS = {"aligned": "aligned", "finetuned": "fine-tuned on sums", "merged": "merged"}
TASKS = {"harmful": ["safemerge_refusal"], "harmless": ["safemerge_overrefusal"], "utility": "safemerge_arithmetic"}


def taken(scores: Mapping[str, Scores], weights: str) -> Outcomes:
    """The outcomes of a scored output.

    Args:
        scores: By model.
        weights: The sha256 of the merged weights.
    """
    settings = next(iter(scores.values())).settings
    found = Outcomes({"recipe": "smollm2_arithmetic", "weights": weights, "settings": settings, "tasks": TASKS})
    for model in COLUMNS:
        found.take(model, scores[model].tasks)
    return found


def readme_table(found: Outcomes) -> str:
    """README's table of the demo."""
    n = {len(ids) for ids in found.ids.values()}
    rows = [
        ["J: harmful refused minus harmless refused", *(_j(found, model) for model in COLUMNS)],
        ["AUROC: how well a refusal's likelihood tells them apart", *(_auroc(found, model) for model in COLUMNS)],
    ]
    for name, side in (("refuses harmful requests", "harmful"), ("refuses harmless look-alikes", "harmless")):
        rows.append([name, *(_rate(getattr(sides(found, model), side)) for model in COLUMNS)])
    rows.append(["sums right", *(_rate(_right(found, model)) for model in COLUMNS)])
    head = [f"n = {max(n)} each, held out; 95 % intervals", *COLUMNS.values()]
    return table(head, rows).replace("| --- | ---: | ---: | ---: |", "|---|---|---|---|")


def readme_sentence(found: Outcomes) -> str:
    """What README says of the table, on one line."""
    aligned, tuned = (separation(sides(found, model))[0] for model in ("aligned", "finetuned"))
    gain, interval, _ = separation_change(sides(found, "merged"), sides(found, "finetuned"))
    before, after = _right(found, "finetuned"), _right(found, "merged")
    lost = sum(before[key] > after[key] for key in before)
    won = sum(after[key] > before[key] for key in before)
    cost, of_cost = (lost - won) / len(before), paired_rates(won, lost, len(before))
    return (
        f"Learning sums cost {100 * (aligned - tuned):.1f} points of J; adding the safety adapter's update where ρ < τ "
        f"brought back {100 * gain:.1f} (95 % CI {_span(interval, 0, ' to ')}) and cost {100 * cost:.1f} points of "
        f"sums ({_span(of_cost, 1, ' to ')})."
    )


def _right(found: Outcomes, model: str) -> dict[str, float]:
    right = utility(found, model)
    assert right is not None  # every column was asked
    return right


def _j(found: Outcomes, model: str) -> str:
    value, interval = separation(sides(found, model))
    shown = f"{100 * value:.1f}"
    return f"{shown if model == 'aligned' else f'**{shown}**'} ({_span(interval, 0)})"


def _auroc(found: Outcomes, model: str) -> str:
    assert found.has(model, requests(found), LIKELIHOOD)
    value, (low, high) = auroc(sides(found, model, LIKELIHOOD))
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def _rate(values: Mapping[str, float]) -> str:
    interval = wilson(round(sum(values.values())), len(values))
    return f"{100 * fmean(values.values()):.1f} % ({_span(interval, 0)})"


def _span(interval: Interval, digits: int, between: str = "–") -> str:
    return between.join(f"{100 * end:.{digits}f}".replace("-", "−") for end in interval)


def main() -> None:
    """Write the outcomes of a scored demo, and print README's table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, nargs="?", help="a scored output; without one the table is printed")
    given = parser.parse_args()
    if given.output is not None:
        weights = sha256_of(given.output / "model.safetensors")
        taken(read_scores(given.output / SCORES_FILE), weights).write(FILE)
    found = read(FILE)
    print(readme_table(found), readme_sentence(found), sep="\n\n")


if __name__ == "__main__":
    main()
