"""The picture of a benchmark record: median wall time and own peak memory of every contestant, by case.

python -m benchmarks.timing.picture benchmarks/results/llama-1.1b.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS, PEER, FLOOR = "#2a6f97", "#c9a227", "#9a9a9a"


def _colour(name: str) -> str:
    if name.startswith(("ours", "second", "first")):
        return OURS
    return FLOOR if name in ("floor", "bare python") else PEER


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a record into `path`; bars carry the ratio to the first contestant of their case."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same record draws the same file
    from matplotlib import pyplot

    cases = [case for case in record["cases"] if case.get("summary")]
    if not cases:
        return
    rows = [(case, name) for case in cases for name in case["summary"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1 + 0.26 * (len(rows) + len(cases))), sharey=True)
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for case in cases:
        axes[0].annotate(case["title"], (0, y), xycoords=("axes fraction", "data"), weight="bold", fontsize=8,
                         xytext=(-190, -3), textcoords="offset points")  # fmt: skip
        y += 1
        for name, row in case["summary"].items():
            ticks.append((y, name))
            colour = _colour(name)
            axes[0].barh(y, row["wall"], color=colour)
            axes[1].barh(y, row["peak_own"] / 1e6, color=colour)
            ratio = f"  {row['ratio']['median']:.2f}×" if "ratio" in row else ""
            axes[0].annotate(f" {row['wall']:.2f} s{ratio}", (row["wall"], y), va="center", fontsize=7)
            own = row["peak_own"] / 1e6
            axes[1].annotate(f" {own:.0f} MB", (own, y), va="center", fontsize=7)
            y += 1
    axes[0].set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("wall time, s (median; log scale)", fontsize=8)
    axes[1].set_xlabel("own peak memory, MB (log scale; mapped files not counted)", fontsize=8)
    for axis in axes:
        axis.set_xscale("log")
        axis.margins(x=0.2, y=0.01)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    computer = record["machine"]
    figure.suptitle(f"{record['size']}, {computer['cores']} cores, {computer['processor']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        draw(json.loads(Path(given).read_text()), Path(given).with_suffix(".svg"))
