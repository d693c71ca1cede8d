"""A progress bar in bytes with time left, on a terminal; nothing in a pipe."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safemerge_recipes.events import BytesDone, Event, PhaseStarted

if TYPE_CHECKING:
    from safemerge_recipes.evaluation.rounds import Step


class Bar:
    """A listener that draws phases one after the other on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._progress: Any = None
        self._task: Any = None
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Takes notice of an event."""
        if not self._shown:
            return
        if isinstance(event, PhaseStarted):
            self._begin(event)
        elif isinstance(event, BytesDone):
            with self._lock:
                if self._progress is not None:
                    self._progress.advance(self._task, event.nbytes)

    def _begin(self, event: PhaseStarted) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if self._progress is None:
            columns = (
                TextColumn("{task.description:>8}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=8)
            self._progress.start()
        elif self._task is not None:
            self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(event.name, total=event.nbytes)

    def pause(self) -> None:
        """Takes the bar off the screen until the next phase."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
                self._progress = self._task = None


class ScoringBar:
    """Draws on standard error which model answers which task, and the time left for all of them."""

    def __init__(self) -> None:
        self._stream = sys.stderr  # not what others put in its place while they are kept quiet
        self._progress: Any = None
        self._task: Any = None

    def __call__(self, step: Step) -> None:
        """Shows how far scoring is."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(file=self._stream)
            self._progress = Progress(*columns, console=console, transient=True, refresh_per_second=4)
            self._progress.start()
            self._task = self._progress.add_task("", total=step.total)
        words = f"model {step.place} of {step.models}, {step.model}: {step.task}"
        self._progress.update(self._task, description=words, completed=step.done, total=step.total)

    def pause(self) -> None:
        """Takes the bar off the screen until the next step."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextlib.contextmanager
def scoring_bar() -> Iterator[ScoringBar | None]:
    """A bar for scoring if standard error is a terminal."""
    bar = ScoringBar() if sys.stderr.isatty() else None
    try:
        yield bar
    finally:
        if bar is not None:
            bar.pause()
