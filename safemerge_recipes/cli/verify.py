"""`verify` and `sign`: whether an output is what was written, whether its arithmetic is right, and whose it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from safemerge_recipes import api
from safemerge_recipes.cli.options import DeviceOption, JsonOption, MemoryOption, WorkersOption
from safemerge_recipes.cli.streams import watched, write_json, write_line


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output to check.", show_default=False)],
    deep: Annotated[bool, typer.Option("--deep", help="Compute every tensor again from the sources.")] = False,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=1, help="Compute only N tensors again; implies --deep.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Which N.")] = 0,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="PEM", help="Check that its owner signed the output.")
    ] = None,
    json_: JsonOption = False,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    max_memory: MemoryOption = "2GB",
) -> None:
    """Check an output against its manifest and plan: hashes, index, headers, and with --deep the arithmetic."""
    with watched(json_) as listener:
        result = api.verify(
            folder, deep=deep, sample=sample, seed=seed, public_key=public_key,
            device=device, workers=workers, max_memory=max_memory, on_event=listener,
        )  # fmt: skip
    if json_:
        write_json(result)
    told = f"{result['tensors']} tensors" if "tensors" in result else f"{result['lines']} scores and answers"
    again = f", {result['recomputed']} tensors computed again" if result.get("recomputed") else ""
    sys.stderr.write(f"{folder}: sound ({result['files']} files, {told}{again})\n")
    for heading, key in (("checked", "checked"), ("not checked", "unchecked")):
        sys.stderr.write("".join(f"  {heading}: {line}\n" for line in result[key]))


def sign(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished output.", show_default=False)],
    private_key: Annotated[
        Path, typer.Option("--private-key", metavar="PEM", help="An elliptic-curve key of your own.")
    ],
) -> None:
    """Sign an output with sigstore's model-signing, so that others can tell your manifest from a stranger's."""
    write_line(str(api.sign(folder, private_key)))
