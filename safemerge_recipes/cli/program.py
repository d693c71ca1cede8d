"""A program from its first line to its exit code: what is caught, what is said, how it ends."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from safemerge_recipes.cli.streams import open_streams
from safemerge_recipes.errors import PlanError, RecipeError, SafemergeError, WriteError
from safemerge_recipes.storage.descriptors import raise_limit

# Some versions of typer bring their own click, whose errors are no errors of the installed one.
USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
COLLECT_AFTER = 20_000
"""New objects after which Python looks for cycles. Its own 700 cost a fifth of the time it takes to load torch."""


def run_program(app: typer.Typer, name: str, arguments: list[str] | None) -> NoReturn:
    """Runs a command line and ends the process, or raises SystemExit where the arguments are given by a caller."""
    alone = arguments is None
    if alone:
        open_streams()
        raise_limit()
        gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])

    def call() -> Any:
        _check_folder()
        return app(arguments, standalone_mode=False, prog_name=name)

    code = guarded(call)
    if alone:
        _leave(code)
    sys.exit(code)


def _check_folder() -> None:
    """Refuses to start in a folder that is no more: nobody could say what a relative path means. Raises PlanError."""
    try:
        os.getcwd()
    except OSError as error:
        raise PlanError(f"the current folder: {error.strerror}; change to one that exists") from None


def _leave(code: int) -> NoReturn:
    """Ends the process without taking torch apart first, which takes half a second and serves nobody."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # `guarded` has told, or nobody listens any more
            stream.flush()
    os._exit(code)


def guarded(call: Callable[[], Any]) -> int:
    """The exit code of a command; every error becomes one message on standard error."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, stop)  # a scheduler's notice ends a run as Ctrl-C does
        code = call()
        sys.stdout.flush()  # what cannot be printed is told here, too
        return code if isinstance(code, int) else 0
    except SafemergeError as error:
        _complain(str(error))
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except USAGE_ERROR as error:
        _complain(f"{error.format_message()}; see --help")
        return RecipeError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped; nothing is half written, the same command starts again")
        return WriteError.exit_code
    except BrokenPipeError:
        return 0
    except SystemExit as end:  # click ends the process where nobody reads on, as in `| head`
        if isinstance(end.__context__, BrokenPipeError):
            return 0
        raise
    except OSError as error:  # those of sources and outputs were told where they happened
        _complain(
            f"{error.filename or 'standard output'}: {error.strerror or error}; free some space or write elsewhere"
        )
        return WriteError.exit_code
    except MemoryError:
        _complain("the machine has no memory left; lower --max-memory or --workers, or close other programs")
        return PlanError.exit_code
    except Exception as error:  # the last line of defence: a bug, but still one message and no traceback
        _complain(f"a bug in safemerge: {type(error).__name__}: {error}; please report it with the recipe")
        return 1


_LONGEST = 2000
"""Characters of one line of a message; what stands in a stranger's file may be of any length."""


def _complain(message: str) -> None:
    lines = (line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…" for line in message.split("\n"))
    text = "\n".join("".join(c if c.isprintable() else "�" for c in line) for line in lines)
    sys.stderr.write(f"safemerge: {_without_secrets(text)}\n")


def _without_secrets(text: str) -> str:
    """The text without access tokens and without passwords in addresses."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        text = text.replace(os.environ.get(name) or "\0", "<token>")
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)
    return re.sub(r"(\w+:/+)[^/@\s]+@", r"\1<secret>@", text)
