"""The two ways to say what deltas weigh: `weights`, or a short form for two. One takes the place of the other."""

from __future__ import annotations

SHORT = ("alpha", "lambda_finetuned", "lambda_safety")
"""The keys of the short forms."""


def displaced(keys: object) -> tuple[str, ...]:
    """Which keys of a merge give way where these are set anew."""
    given = set(keys) if isinstance(keys, dict | list | tuple | set) else set()
    if "weights" in given:
        return SHORT
    return ("weights",) if given & set(SHORT) else ()
