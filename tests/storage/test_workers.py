"""Errors of a worker reach the caller, whatever they are, and nobody is left behind.

Guards `storage.threads`.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from safemerge_recipes.errors import PlanError, SourceError
from safemerge_recipes.storage.workers import Attempt, StoppedError, check, run_parallel


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


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_first_of_several_bad_sources_is_named_whatever_the_workers(workers: int) -> None:
    """The later one fails at once, the earlier one only when the later one has."""
    failed = threading.Event()

    def work(item: int, arena: Any) -> None:
        if item == 0:
            failed.wait(0.2)
            raise SourceError("the first")
        if item == 1:
            failed.set()
            raise SourceError("the second")

    for _ in range(5):
        failed.clear()
        with pytest.raises(SourceError, match="the first"):
            run_parallel(list(range(8)), work, workers, "cpu", threading.Event(), light=True)


def test_work_that_is_told_to_stop_is_not_taken_for_finished() -> None:
    stop = threading.Event()

    def work(item: int, arena: Any) -> None:
        stop.set()
        check(stop)

    for _ in range(2):  # half-way, and before anything is begun
        with pytest.raises(StoppedError):
            run_parallel([0, 1], work, 1, "cpu", stop, light=True)


def test_an_attempt_fails_for_itself_and_ends_with_the_whole() -> None:
    whole = threading.Event()
    first, second = Attempt(whole), Attempt(whole)
    first.set()
    assert first.is_set()
    assert not second.is_set()
    whole.set()
    assert second.is_set()


def test_fewer_threads_than_wanted_do_all_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    allowed = 2
    run_parallel(list(range(50)), lambda item, arena: done.append(item), 6, "cpu", threading.Event(), light=True)
    assert sorted(done) == list(range(50))
    started.clear()
    allowed = 0
    with pytest.raises(PlanError, match="no more threads"):
        run_parallel([1], lambda item, arena: None, 6, "cpu", threading.Event(), light=True)


def test_a_signal_ends_no_wait_before_the_threads_end() -> None:
    """`threading.Thread.join` believes a thread gone once a signal has broken off the wait for it."""
    ended = []

    def work(item: int, arena: Any) -> None:
        time.sleep(0.3)
        ended.append(item)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            run_parallel([1, 2, 3], work, 2, "cpu", threading.Event(), light=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sorted(ended) == [1, 2]
