"""Items made ahead come in order, errors where they are used, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from safemerge_recipes.storage.read_ahead import AHEAD, ahead
from safemerge_recipes.storage.workers import StoppedError


def test_items_come_in_order_and_no_more_than_promised_exist() -> None:
    made = used = 0
    most = 0

    def items() -> Iterator[int]:
        nonlocal made, most
        for number in range(200):
            made += 1
            most = max(most, made - used)
            yield number

    found = []
    for number in ahead(items(), threading.Event()):
        found.append(number)
        time.sleep(0.0005)
        used += 1  # done with this one
    assert found == list(range(200))
    assert 2 <= most <= AHEAD


def test_an_error_is_raised_where_the_items_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise IndexError("the second")

    found = ahead(items(), threading.Event())
    assert next(found) == 1
    with pytest.raises(IndexError, match="the second"):
        next(found)


def test_both_sides_leave_when_they_are_stopped() -> None:
    stop, left = threading.Event(), threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            left.set()

    items = endless()
    found = ahead(items, stop)
    next(found)
    stop.set()
    with pytest.raises(StoppedError):
        for _ in found:
            pass
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    for thread in threads:
        thread.join(5)
    items.close()
    assert left.is_set()


def test_waiting_for_an_item_ends_when_stopped() -> None:
    stop, go = threading.Event(), threading.Event()

    def slow() -> Iterator[int]:
        go.wait(1)
        yield 1

    threading.Timer(0.1, stop.set).start()
    with pytest.raises(StoppedError):
        next(ahead(slow(), stop))
    go.set()
