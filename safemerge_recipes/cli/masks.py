"""`score`: a value for every element of the gated tensors, for masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safemerge_recipes import api
from safemerge_recipes.cli.options import DeviceOption, JsonOption, MemoryOption, RecipeArgument, SetOption
from safemerge_recipes.cli.streams import watched, write_json, write_line


def score(
    recipe: RecipeArgument,
    by: Annotated[
        str, typer.Option(metavar="KIND", help="magnitude, drift, opposed, wanda, snip, fisher or safe-delta.")
    ],
    of: Annotated[str, typer.Option(metavar="ROLE", help="The source that is scored.")] = "finetuned",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Rows (JSONL) or lines (.txt) to run it on; repeatable."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="all|answer", help="Which tokens count; default: as the kind has it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts, drawn by the seed.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that draw.")] = 0,
    max_length: Annotated[int, typer.Option(min=2, help="Longer prompts are cut to so many tokens.")] = 1024,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: KIND.safetensors beside the recipe.")
    ] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    max_memory: MemoryOption = "2GB",
) -> None:
    """Write a score for every element of the gated tensors, from weights or activations, for merge.mask."""
    with watched(json_) as listener:
        about = api.score(
            api.load_recipe(recipe, set_ or ()), by, of=of, prompts=prompts or (), tokens=tokens, limit=limit,
            seed=seed, max_length=max_length, output=output, device=device, max_memory=max_memory, on_event=listener,
        )  # fmt: skip
    if json_:
        write_json(about)
    else:
        write_line(about["path"])
