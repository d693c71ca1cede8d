"""The licences of the sources: what the card may state, and what to say where they disagree. Plain data in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from safemerge_recipes.text import clean

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")


def licence_of(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of the licence that all sources share; empty if any is unknown or differs.

    An identifier that the hub does not know becomes `other` with a `license_name`, as the hub wants it.
    """
    found = {str(source.get("license") or "").lower() for source in sources.values()}
    only = found.pop() if len(found) == 1 else ""
    known = (files("safemerge_recipes.report") / "assets" / "licences.txt").read_text(encoding="utf-8").split()
    if only in known and only != "other":
        return {"license": only}
    named = _NAME.fullmatch(only) and only not in ("other", "unknown")
    return {"license": "other", "license_name": only} if named else {}


def licence_note(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """A warning where the sources' licences differ, or are known of some alone; else nothing."""
    stated = {clean(role, 40): clean(source.get("license"), 60) for role, source in sources.items()}
    known = {role: licence for role, licence in stated.items() if licence}
    if not known or (len(set(known.values())) == 1 and len(known) == len(stated)):
        return ""
    told = ", ".join(f"{role} {licence or 'none stated'}" for role, licence in stated.items())
    return f"The sources do not all state the same licence ({told}): read them before you share this model."
