"""The cache: what is stored is found again, damage counts as absence, and killed writers leave nothing for ever.

Guards `storage.cache`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from safemerge_recipes.storage.cache import STALE, recall, remember


def test_what_is_remembered_is_recalled_and_damage_is_absence(own_cache: Path) -> None:
    remember("digests", "key", {"a": [1.5, None]})
    assert recall("digests", "key") == {"a": [1.5, None]}
    assert recall("digests", "other") is None
    (entry,) = (path for path in own_cache.rglob("*.json"))
    entry.write_text(entry.read_text().replace("1.5", "1.6"))
    assert recall("digests", "key") is None


@pytest.mark.parametrize("age", [0, 2 * STALE])
def test_what_a_killed_writer_left_is_removed_when_it_is_old(own_cache: Path, age: int) -> None:
    remember("digests", "key", 1)
    (entry,) = (path for path in own_cache.rglob("*.json"))
    left = entry.with_name(f".{entry.name}.0123456789abcdef.tmp")
    left.write_text("torn")
    os.utime(left, (time.time() - age,) * 2)
    os.utime(entry, (time.time() - age,) * 2)
    remember("digests", "key", 2)
    assert left.exists() == (age == 0)
    assert recall("digests", "key") == 2
