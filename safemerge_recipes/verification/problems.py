"""What is wrong with an output, as one error; and when a value of a plan is what it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError

SHOWN = 20
"""Problems listed in one message."""


def refuse(folder: Path, problems: list[str]) -> None:
    """Raises CheckError with what is wrong with an output, if anything is."""
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join([*problems[:SHOWN], *more])
        raise CheckError(
            f"{folder}: not as it was written; get it again, or run its recipe again with --force\n  {listed}"
        )


_ROUNDING = 1e-5
"""Relative difference of measured numbers that other processors' order of additions explains."""


def same(now: Any, then: Any) -> bool:
    """Whether a value of a plan is what it was, numbers up to rounding."""
    if isinstance(now, float) and isinstance(then, int | float) and not isinstance(then, bool):
        return math.isclose(now, then, rel_tol=_ROUNDING, abs_tol=1e-12)
    if isinstance(now, dict) and isinstance(then, dict):
        return now.keys() == then.keys() and all(same(now[key], then[key]) for key in now)
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(same, now, then))
    return bool(now == then) and isinstance(then, type(now))
