"""What `always` and `never` share: all or none."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.base import Decision, Selector


def constant(merge: bool) -> Selector:
    """The selector; `merge`: all."""
    word = "always" if merge else "never"
    return Selector(lambda q: {c.name: Decision(merge, word) for c in q.candidates}, lambda q: set(), measured=False)
