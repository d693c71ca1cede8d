"""The terminal's summary of a training plan: plain data in, text on a rich console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_training(plan: Mapping[str, Any], console: Console) -> None:
    """Prints what an adapter is trained on and what that takes, or where it lies.

    Args:
        plan: as `train-adapter --json` prints it; `peak_memory` in bytes.
        console: where it goes.
    """
    state = f"is there: {plan['adapter']}" if plan["trained"] else "is to be trained"
    lines = [f"Adapter {plan['key'][:16]}… {state}"]
    for size, steps in plan["steps"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in plan["rows"][size].items())
        lines.append(f"  {size} rows ({kinds}): {steps} steps")
    lines.append(
        f"  {plan['matrices']} matrices, {plan['parameters']:,} parameters; about {plan['peak_memory'] / 1e9:.1f} GB, "
        f"very roughly {max(1, round(plan['minutes']))} min"
    )
    dropped = plan["near_copies_dropped"]
    lines += [f"  {dropped} near copies left out"] if dropped else []
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    for warning in plan["warnings"]:
        console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
