"""A progress bar in bytes with time left, on a terminal; nothing in a pipe."""

from __future__ import annotations

import sys
import threading
from typing import Any


class Bar:
    """Draws phases one after the other on standard error."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._lock = threading.Lock()

    def phase(self, name: str, nbytes: int) -> None:
        """Begins a phase of so many bytes."""
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
        self._task = self._progress.add_task(name, total=nbytes)

    def tick(self, nbytes: int) -> None:
        """Moves on by so many bytes."""
        with self._lock:
            if self._progress is not None:
                self._progress.advance(self._task, nbytes)

    def pause(self) -> None:
        """Takes the bar off the screen until the next phase."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
                self._progress = self._task = None


class Quiet:
    """Draws nothing."""

    def phase(self, name: str, nbytes: int) -> None:
        """Does nothing."""

    def tick(self, nbytes: int) -> None:
        """Does nothing."""

    def pause(self) -> None:
        """Does nothing."""


def progress_bar() -> Bar | Quiet:
    """A bar if standard error is a terminal."""
    return Bar() if sys.stderr.isatty() else Quiet()
