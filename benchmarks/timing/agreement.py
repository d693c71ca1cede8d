"""How far two results agree: merged checkpoints tensor by tensor, gate readings by name.

A ratio of times means something only beside it. Reads one tensor at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.published_gate import Folder


def _some(names: set[str]) -> list[str]:
    """The first of them by name, and how many more there are."""
    first = sorted(names)[:5]
    return first if len(names) <= 5 else [*first, f"and {len(names) - 5} more"]


def compare_checkpoints(ours: Path, theirs: Path) -> dict[str, Any]:
    """Return counts of differing tensors and elements, the largest difference and the relative L2 distance.

    Distances are of the values stored, in float64 sums over float32 differences.
    """
    ours_at, theirs_at = Folder(ours), Folder(theirs)
    common = [name for name in ours_at.handles if name in theirs_at.handles]
    elements = different = identical_tensors = 0
    largest = squares = total = 0.0
    for name in common:
        a, b = ours_at[name], theirs_at[name]
        unequal = int((a != b).sum())
        elements, different = elements + a.numel(), different + unequal
        identical_tensors += unequal == 0 and a.dtype == b.dtype
        total += float(b.float().norm().double() ** 2)
        if unequal:
            gap = a.float().sub_(b.float())
            largest = max(largest, float(gap.abs().max()))
            squares += float(gap.norm().double() ** 2)
    return {
        "tensors": len(common),
        "only_ours": _some(set(ours_at.handles) - set(common)),
        "only_theirs": _some(set(theirs_at.handles) - set(common)),
        "identical_tensors": identical_tensors,
        "different_elements": different / max(elements, 1),
        "largest_difference": largest,
        "relative_distance": (squares / total) ** 0.5 if total else 0.0,
    }


def read_rho(log: Path) -> dict[str, float]:
    """Return ρ by tensor name from a plan (`--dry-run --json`) or from the published gate's output."""
    value = json.loads(log.read_text())
    if "tensors" not in value:
        return value
    return {line["name"]: line["rho"] for line in value["tensors"] if line.get("rho") is not None}


def compare_rho(ours: Path, theirs: Path) -> dict[str, Any]:
    """Return the number of readings both have and their largest difference."""
    a, b = read_rho(ours), read_rho(theirs)
    common = sorted(set(a) & set(b))
    gaps = [abs(a[name] - b[name]) for name in common]
    return {
        "readings": len(common),
        "only_ours": _some(set(a) - set(b)),
        "only_theirs": _some(set(b) - set(a)),
        "largest_difference": max(gaps, default=None),
    }
