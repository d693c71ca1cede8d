"""The arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safemerge_recipes import __version__, api
from safemerge_recipes.cli.streams import check_open, write_line


def _json(value: bool) -> bool:
    if value:
        check_open()
    return value


def _tell_version(asked: bool) -> None:
    if asked:
        kernels = "compiled kernels" if api.compiled() else "kernels not compiled: slower, see the README"
        write_line(f"{__version__} ({kernels})")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", callback=_tell_version, is_eager=True)
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="The recipe: a YAML file, the folder of an output, on the hub org/model or hf://org/repo/file.yaml, or - "
        "for standard input.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."),
]
SourceOption = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="ROLE=PLACE", help="A folder or hub id instead of the recipe's; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable on standard output.", callback=_json)]
OutputOption = Annotated[str | None, typer.Option("--output", "-o", metavar="DIR|URL", help="Instead of output.path.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a finished output.")]
EmptyOption = Annotated[
    bool, typer.Option("--allow-empty", help="Write the fine-tuned model where the gate merges nothing.")
]
FolderOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where gate and merge are computed.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default: one a core.")]
MemoryOption = Annotated[str, typer.Option("--max-memory", metavar="SIZE", help="Own memory, such as 256MB or 2GB.")]
ExecutorOption = Annotated[str, typer.Option(metavar="local|ray", help="Which engine carries out the graph.")]
AddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="auto|ray://HOST:PORT", help="The Ray cluster; default: one of its own."),
]
TasksOption = Annotated[
    list[str] | None, typer.Option("--tasks", "-t", metavar="TASK", help="Tasks; repeatable, or joined by commas.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only so many prompts of each task.")]


def tasks_of(given: list[str] | None) -> list[str]:
    """The tasks of a repeatable option whose values may be joined by commas."""
    return [task for text in given or () for task in text.split(",") if task]
