"""Standard streams: where people and where programs read, and what happens where a stream is closed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safemerge_recipes.cli.progress import Bar
from safemerge_recipes.errors import WriteError
from safemerge_recipes.storage.files import null_device

if TYPE_CHECKING:
    from rich.console import Console

_CLOSED: set[str] = set()
"""The standard streams that were closed when the program began."""


def open_streams() -> None:
    """Puts the null device in the place of standard streams that are closed, as under cron or in a daemon.

    Otherwise the next files that are opened would get their numbers, and what is printed.
    """
    while True:
        number = null_device()
        if number > 2:
            os.close(number)
            break
        os.set_inheritable(number, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _CLOSED.add(name)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def check_open() -> None:
    """Refuses to go on where standard output is wanted and closed. Raises WriteError."""
    if "stdout" in _CLOSED:
        raise WriteError("standard output: found it closed; expected it open, since the result goes there")


def write_line(text: str) -> None:
    """Writes a result to standard output. Raises WriteError where that is closed."""
    check_open()
    sys.stdout.write(f"{text}\n")


def write_json(value: Any) -> None:
    """Writes a result to standard output as one line of JSON."""
    write_line(json.dumps(value, ensure_ascii=False, allow_nan=False))


def console(json_: bool) -> Console:
    """Where people read: standard output, or standard error where that one is for a program."""
    from rich.console import Console

    return Console(stderr=json_, highlight=False)


@contextlib.contextmanager
def watched(json_: bool) -> Iterator[Bar]:
    """A listener that shows progress, and notes where people read."""
    bar = Bar(lambda: console(json_))
    try:
        yield bar
    finally:
        bar.pause()
