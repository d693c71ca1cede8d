"""Cli: the command line."""

from __future__ import annotations

import sys

if sys.platform == "win32":  # before anything that Windows does not have is imported
    sys.stderr.write("safemerge: found Windows; expected Linux or macOS, on Windows use WSL (`wsl --install`)\n")
    raise SystemExit(4)


def main(arguments: list[str] | None = None) -> None:
    """The program `safemerge`, for a script that imports it; nothing of it is loaded before the call."""
    from safemerge_recipes.cli import app

    app.main(arguments)
