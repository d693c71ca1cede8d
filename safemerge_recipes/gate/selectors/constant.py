"""`always` and `never`: all or none."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.base import Decision, Selector


def _constant(merge: bool) -> Selector:
    word = "always" if merge else "never"
    return Selector(lambda q: {c.name: Decision(merge, word) for c in q.candidates}, lambda q: set(), measured=False)


ALWAYS = _constant(True)
NEVER = _constant(False)
