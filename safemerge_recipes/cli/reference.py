"""The reference of the command line, made from its own declarations: docs/commands.md.

`python -m safemerge_recipes.cli.reference` writes it. Nothing is said twice: an option's help is its documentation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from safemerge_recipes.cli.app import app
from safemerge_recipes.errors import SafemergeError
from safemerge_recipes.storage.files import write_file

INTRODUCTION = """# Commands

`safemerge VERB`; `safemerge-run` is `safemerge run`. Results go to standard output, messages and progress to standard
error; with `--json` standard output is one JSON value. `--help` says the same as this page, which
`python -m safemerge_recipes.cli.reference` writes.

"""
CODES = {0: "Done.", 1: "A bug in this program; the message asks for a report."}


def exit_codes() -> dict[int, str]:
    """Every exit code of the program and what it means, by number; the error classes tell theirs."""
    found = dict(CODES)
    for kind in SafemergeError.__subclasses__():
        found[kind.exit_code] = (kind.__doc__ or "").split(" (exit code")[0].strip() + "."
    return dict(sorted(found.items()))


def verbs() -> dict[str, Any]:
    """The commands by name, in the order of `--help`."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def reference() -> str:
    """The page, as Markdown."""
    commands = verbs()
    parts = [INTRODUCTION, "| verb | does |\n|---|---|\n"]
    parts += [f"| [`{name}`](#{name}) | {_cell(command.help)} |\n" for name, command in commands.items()]
    parts.append("\n## Exit codes\n\n| code | means |\n|---|---|\n")
    parts += [f"| {code} | {_cell(text)} |\n" for code, text in exit_codes().items()]
    for name, command in commands.items():
        arguments = [part for part in command.params if part.param_type_name == "argument"]
        shown = " ".join(f"[{_name(part)}]" if not part.required else _name(part) for part in arguments)
        usage = f"safemerge {name} {shown}".rstrip()
        parts.append(f"\n## {name}\n\n```\n{usage} [OPTIONS]\n```\n\n{' '.join((command.help or '').split())}\n\n")
        parts.append("| | | default |\n|---|---|---|\n")
        parts += [_row(part) for part in command.params if part.name != "help"]
    return "".join(parts)


def _name(argument: Any) -> str:
    """An argument as it stands in the usage line."""
    return str(argument.name).upper() + (" …" if argument.nargs == -1 or argument.multiple else "")


def _row(part: Any) -> str:
    """One argument or option: how it is written, what it does, what holds without it."""
    written = f"`{_name(part)}`"
    if part.param_type_name == "option":
        value = "" if getattr(part, "is_flag", False) else f" {part.metavar or 'VALUE'}"
        written = ", ".join(f"`{option}{value}`" for option in part.opts)
    shown = "needed" if part.required else "—" if part.default in (None, False, "") else f"`{part.default}`"
    return f"| {_cell(written)} | {_cell(getattr(part, 'help', ''))} | {shown} |\n"


def _cell(text: str | None) -> str:
    """Text on one line of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def main(folder: str = "docs") -> None:
    """Writes the page into a folder."""
    write_file(Path(folder, "commands.md"), reference())


if __name__ == "__main__":
    main(*sys.argv[1:])
