"""What is freed goes back to the system: guards `storage.heap`, and that `engine.object_store` asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import re, sys
from safemerge_recipes.storage.heap import map_alone

def held():
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])

if sys.argv[1] == "alone":
    map_alone(1 << 20)
if sys.argv[1] == "upload":
    from safemerge_recipes.engine.object_store import ObjectStore

    ObjectStore("memory://out", None).open()
bytearray(30 << 20)  # freed: glibc's threshold grows to its size
before, blocks, kept = held(), [], []
for _ in range(10):
    blocks.append(bytearray(8 << 20))
    kept.append(bytearray(100 << 10))  # stays above it
for block in blocks:
    block[::4096] = b"x" * len(block[::4096])
del block
blocks.clear()
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_is_freed_between_what_stays_goes_back() -> None:
    holes, alone, upload = (
        int(subprocess.run([sys.executable, "-c", HOLES, how], check=True, capture_output=True, text=True).stdout)
        for how in ("as it is", "alone", "upload")
    )
    assert holes > 40 << 20, "the case is no case here"
    assert alone < 8 << 20
    assert upload < 8 << 20
