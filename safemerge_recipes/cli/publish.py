"""`publish`: a finished output to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safemerge_recipes import api
from safemerge_recipes.cli.options import JsonOption
from safemerge_recipes.cli.streams import watched, write_json, write_line
from safemerge_recipes.text import size


def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished output.", show_default=False)],
    repo: Annotated[str, typer.Option("--repo", metavar="ORG/NAME", help="Where it goes; made if it does not exist.")],
    branch: Annotated[
        str | None, typer.Option(metavar="NAME", help="The branch it goes to, such as main; default: a pull request.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=ORG/NAME", help="What a source that was a folder is on the hub; repeatable."),
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Sign what is sent with this elliptic-curve key.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="Send the answers to harmful requests, too, where it was scored.")
    ] = False,
    upload: Annotated[bool, typer.Option("--upload", help="Send it; without, say only what would be sent.")] = False,
    json_: JsonOption = False,
) -> None:
    """Verify an output and send it to the hub as a pull request or to a branch. Cut short, the same command goes on."""
    with watched(json_) as listener:
        done = api.publish(
            folder, repo, branch=branch, sources=source or (), private_key=private_key, private=private,
            answers=answers, upload=upload, on_event=listener,
        )  # fmt: skip
    if json_:
        return write_json(done)
    for line in _lines(folder, done, upload):
        write_line(line)
    return None


def _lines(folder: Path, done: dict[str, Any], upload: bool) -> list[str]:
    files = done["files"]
    width = max(len(one["file"]) for one in files)
    total = size(sum(one["size"] for one in files))
    lines = [f"{folder} is sound; {len(files)} files, {total}, to {done['repository']}:"]
    for one in files:
        note = f"  {one['there'] or '':<9}" + ("  (rewritten for others)" if one["changed"] else "")
        lines.append(f"  {one['file']:<{width}}  {size(one['size']):>8}{note}".rstrip())
    lines.append("Licences: " + ", ".join(f"{role} {name or 'not stated'}" for role, name in done["licences"].items()))
    lines += [f"Note: {note}" for note in done["notes"]]
    removed = ", ".join(done["removed"])
    if not upload:
        lines.append(f"There: {done['there']}{f'; would be removed: {removed}' if removed else ''}")
        return [*lines, "Nothing was sent; --upload sends it."]
    lines += [f"Removed there: {removed}"] if removed else []
    state = f"{len(done['sent'])} files sent" if done["sent"] else "nothing was left to send"
    return [*lines, f"{state}; {done['url']} (run it as {done['repository']}@{done['revision']})"]
