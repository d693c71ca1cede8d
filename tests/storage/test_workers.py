"""Errors of a worker reach the caller, whatever they are."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from safemerge_recipes.storage.workers import run_parallel


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("kind", [IndexError, KeyError, KeyboardInterrupt])
def test_an_error_stops_all_and_is_raised(kind: type[BaseException], light: bool) -> None:
    done = []

    def work(item: int, arena: Any) -> None:
        if item == 1:
            raise kind("a bug")
        done.append(item)

    stop = threading.Event()
    with pytest.raises(kind, match="a bug"):
        run_parallel(list(range(1000)), work, 1, "cpu", stop, light=light)
    assert done == [0]
    assert stop.is_set()
