"""Checks a finished output: its files against the manifest, its headers, index and plan against each other.

With a deep check, tensors are computed again from the sources through the stored recipe and compared by
digest; report and card are rendered again. Writes nothing and keeps no more in memory than a run does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safemerge_recipes.engine.manifest import Manifest, read_manifest
from safemerge_recipes.events import Listener, PhaseStarted
from safemerge_recipes.sources.architecture import Loaded, loads
from safemerge_recipes.sources.checkpoint import open_checkpoint
from safemerge_recipes.sources.peft.adapter import is_adapter
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.verification.documents import check_documents
from safemerge_recipes.verification.files import file_problems
from safemerge_recipes.verification.inventory import inventory_problems
from safemerge_recipes.verification.problems import refuse
from safemerge_recipes.verification.recompute import recompute


def verify(
    folder: Path,
    resources: Resources,
    on_event: Listener,
    *,
    deep: bool = False,
    sample: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Checks an output and returns what was checked: numbers of files, bytes and tensors.

    Args:
        folder: the output.
        resources: what a deep check may use.
        on_event: is told what goes on.
        deep: compute tensors again from the sources.
        sample: only so many of them, drawn with `seed`.
        seed: which sample.

    Raises:
        CheckError: something is not as it was written; the message names the file and, if it can, the tensor.
        SourceError: a source that the deep check needs is missing or does not fit.
    """
    manifest = read_manifest(folder)
    on_event(PhaseStarted("verify", sum(stamp.size for stamp in manifest.outputs.values())))
    problems = [*file_problems(folder, manifest, on_event), *inventory_problems(folder, manifest)]
    refuse(folder, problems)
    found = _loaded(folder) if deep else Loaded(unchecked=("whether transformers loads it as what it is: --deep",))
    refuse(folder, list(found.problems))
    result: dict[str, Any] = {
        "checked": [
            "every file of the manifest, and the manifest itself: size and sha256",
            "headers, index, config and plan against each other",
            *found.checked,
        ],
        "unchecked": [
            "who wrote the manifest: a stranger can make an output whose parts agree",
            *([] if deep else ["whether the sources give these bytes: --deep"]),
            *found.unchecked,
        ],
        "files": len(manifest.outputs),
        "bytes": sum(stamp.size for stamp in manifest.outputs.values()),
        "tensors": len(manifest.tensors),
        "recomputed": 0,
    }
    if deep:
        _deepen(result, folder, manifest, recompute(folder, manifest, resources, on_event, sample, seed))
        result["unchecked"].append("plan: its warnings, and the recipe as it repeats it")
        if sample is not None:
            result["unchecked"].append("tensors outside the sample")
    return result


def _deepen(result: dict[str, Any], folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Adds to a result what its deep check has shown, which computed the tensors of these names again."""
    result["recomputed"] = len(names)
    result["checked"] += [
        "sources: sha256 of every weight file, read anew",
        "plan: made again and compared line by line",
        f"tensors: {len(names)} computed again from the sources",
        "config, tokenizer and other side files against the sources'",
    ]
    rendering = check_documents(folder, manifest)
    result["unchecked" if rendering else "checked"].append(rendering or "report and card: rendered again")


def _loaded(folder: Path) -> Loaded:
    """What transformers makes of the output; of an adapter nothing, as its base model lies elsewhere."""
    return (
        Loaded(unchecked=("whether it loads with its base model",))
        if is_adapter(folder)
        else loads(open_checkpoint(folder))
    )
