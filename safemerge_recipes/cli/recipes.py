"""`init`, `import`, `recipes` and `mergekit-yaml`: recipes from models, from mergekit, and those that are shipped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from safemerge_recipes import api
from safemerge_recipes.cli.options import JsonOption
from safemerge_recipes.cli.streams import write_json, write_line

FileOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the recipe there, instead of printing it.")
]


def init(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PLACE",
            show_default=False,
            help="An adapter, a fine-tuned model, an aligned and a fine-tuned model, or a family such as llama-3.1-8b.",
        ),
    ] = None,
    aligned: Annotated[str, typer.Option(metavar="PLACE", help="The aligned model that was fine-tuned.")] = "",
    base: Annotated[str, typer.Option(metavar="PLACE", help="The model before alignment.")] = "",
    safety: Annotated[str, typer.Option(metavar="PLACE", help="A safety-tuned model or adapter.")] = "",
    name: Annotated[str, typer.Option(help="Name of the result; -safe is added.")] = "",
    output: FileOption = None,
) -> None:
    """Write a first recipe, with comments, for an adapter or a model. Asks for what is not said, on a terminal."""
    given = {"aligned": aligned, "base": base, "safety": safety, "name": name}
    asked = None
    if sys.stdin.isatty() and sys.stderr.isatty():
        places = places or [typer.prompt("The fine-tuned model or adapter (a folder or hub id), or a family", err=True)]

        def asked(role: str, question: str, known: str) -> str:
            return given[role] or str(typer.prompt(question, default=known, err=True))

    text = api.first_recipe(places or [], output, given=given, ask=asked)
    write_line(str(output) if output else text.rstrip("\n"))


def import_(
    file: Annotated[Path, typer.Argument(help="A file for mergekit-yaml.", show_default=False)],
    output: FileOption = None,
    like: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A local model with the same tensors, where the file's models are not here."),
    ] = None,
) -> None:
    """Make a recipe with the same tensors of a mergekit file. What has no counterpart is named, with its line."""
    text = api.import_mergekit(file, output, like=like)
    write_line(str(output) if output else text.rstrip("\n"))


def recipes(
    action: Annotated[str, typer.Argument(metavar="list|show", help="List them, or print one.")] = "list",
    name: Annotated[str, typer.Argument(help="Which one, such as defenses/resta.", show_default=False)] = "",
    output: FileOption = None,
    json_: JsonOption = False,
) -> None:
    """List the recipes that come with the package, or `show NAME`. `safemerge-run safemerge:NAME` runs one."""
    if action == "show" and name:
        text = api.shipped_recipe(name, output)
        return write_line(str(output) if output else text.rstrip("\n"))
    if action != "list" or name:
        raise typer.BadParameter(f"found {action!r} {name}; expected list, or show NAME")
    known = api.shipped_recipes()
    if json_:
        return write_json([{"name": one, "source": source} for one, source in known.items()])
    width = max(map(len, known), default=0)
    for one, source in known.items():
        write_line(f"{one:<{width}}  {source}".rstrip())
    return None


def mergekit_yaml(
    arguments: Annotated[
        list[str], typer.Argument(help="What mergekit-yaml takes: the file, the folder to write, its options.")
    ],
) -> None:
    """Run mergekit-yaml with `merge_method: safemerge` among its methods."""
    api.mergekit_yaml(arguments)
