"""An output's headers, index, config, plan and manifest against each other. Reads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safemerge_recipes.engine.folder import MANIFEST_FILE, PLAN_FILE
from safemerge_recipes.engine.manifest import Manifest, read_record
from safemerge_recipes.errors import CheckError, SourceError
from safemerge_recipes.sources.architecture import disagreements
from safemerge_recipes.sources.checkpoint import open_checkpoint
from safemerge_recipes.sources.peft.adapter import is_adapter, open_adapter
from safemerge_recipes.storage.layout import INDEX_FILE


def _warned(folder: Path) -> list[str]:
    """What the plan warned of, and so is as it was meant; a deep check makes the plan again."""
    try:
        said = read_record(folder / PLAN_FILE).get("warnings")
    except CheckError:
        return []
    return [line for line in said if isinstance(line, str)] if isinstance(said, list) else []


def inventory_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What does not fit between headers, index, config, plan and manifest."""
    try:
        if is_adapter(folder):  # its inventory is its own: the plan lists the full model's tensors
            open_adapter(folder)
            return
        checkpoint = open_checkpoint(folder)
    except SourceError as error:
        yield str(error)
        return
    told = _warned(folder)
    yield from (line for line in disagreements(checkpoint) if not any(warning.startswith(line) for warning in told))
    listed = {name for name in manifest.outputs if name.endswith(".safetensors")}
    used = {Path(file).name for file in checkpoint.files}
    if listed != used:
        yield f"{INDEX_FILE}: uses {len(used)} weight files; the manifest has {len(listed)}"
    try:
        lines = read_record(folder / PLAN_FILE)["tensors"]
        plan = {line["name"]: (line["dtype"], tuple(line["shape"])) for line in lines}
        if len(plan) != len(lines):
            raise ValueError("a tensor stands there twice")
    except CheckError as error:
        yield str(error)
        return
    except (KeyError, TypeError, ValueError) as error:
        yield f"{PLAN_FILE}: not a plan ({type(error).__name__}: {str(error)[:200]})"
        return
    found = {name: (ref.dtype, ref.shape) for name, ref in checkpoint.tensors.items()}
    for name in {**plan, **found, **manifest.tensors}:
        where = Path(checkpoint.tensors[name].path).name if name in found else PLAN_FILE
        shown = name if isinstance(name, str) and name.isprintable() else repr(name)
        if name not in plan:
            yield f"{where}: {shown}: the plan has no such tensor"
        elif name not in found:
            yield f"{where}: {shown}: no weight file holds it"
        elif found[name] != plan[name]:
            yield f"{where}: {shown}: is {found[name]}; the plan says {plan[name]}"
        elif name not in manifest.tensors:
            yield f"{MANIFEST_FILE}: {shown}: the manifest has no such tensor"
