"""Shows events to people: a bar in bytes with time left on a terminal, nothing in a pipe; notes as lines."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from safemerge_recipes.events import BytesDone, Event, Note, PhaseStarted, Step, TrainingStep

if TYPE_CHECKING:
    from rich.console import Console


class Bar:
    """A listener that draws phases one after the other on standard error, if that is a terminal.

    Args:
        console: Makes the console that notes go to.
    """

    def __init__(self, console: Callable[[], Console]) -> None:
        self._console = console
        self._stream = sys.stderr  # not what others put in its place while they are kept quiet
        self._shown = self._stream.isatty()
        self._progress: Any = None
        self._task: Any = None
        self._counts = False
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Takes notice of an event."""
        if isinstance(event, Note):
            self.pause()
            style = "yellow" if event.warning else None
            self._console().print(event.text, style=style, markup=False, soft_wrap=True)
        elif self._shown and isinstance(event, PhaseStarted):
            self._begin(event)
        elif self._shown and isinstance(event, BytesDone):
            with self._lock:
                if self._progress is not None:
                    self._progress.advance(self._task, event.nbytes)
        elif self._shown and isinstance(event, Step):
            words = f"model {event.place} of {event.models}, {event.model}: {event.task}"
            self._count(words, event.done, event.total)
        elif self._shown and isinstance(event, TrainingStep):
            loss = "" if event.loss is None else f", loss {event.loss:.3f}"
            self._count(f"{event.rows} rows{loss}" if event.done else "loading", event.done, event.total)

    def _count(self, words: str, done: int, total: int) -> None:
        """Shows what is under way, how far it is, and the time left for all of it."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        if self._progress is None or not self._counts:
            self.pause()
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._start(*columns, often=4)
            self._task, self._counts = self._progress.add_task("", total=total), True
        self._progress.update(self._task, description=words, completed=done, total=total)

    def _start(self, *columns: Any, often: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(file=self._stream)
        self._progress = Progress(*columns, console=console, transient=True, refresh_per_second=often)
        self._progress.start()

    def _begin(self, event: PhaseStarted) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        if self._counts:
            self.pause()
        if self._progress is None:
            columns = (
                TextColumn("{task.description:>8}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._start(*columns, often=8)
        elif self._task is not None:
            self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(event.name, total=event.nbytes)

    def pause(self) -> None:
        """Takes the bar off the screen until the next phase."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
                self._progress = self._task = None
                self._counts = False
