"""Whether a finished output is sound, and whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safemerge_recipes.api.given import resources_of
from safemerge_recipes.events import Listener, ignore


def verify(
    folder: str | Path,
    *,
    deep: bool = False,
    sample: int | None = None,
    seed: int = 0,
    public_key: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Checks an output against its manifest and plan, or the results of a sweep or probe against their digests.

    Args:
        folder: the output, or a folder of results.
        deep: compute every tensor again from the sources and compare the bytes.
        sample: only so many of them, drawn with `seed`; implies `deep`.
        seed: which sample.
        public_key: a PEM file; the output has to be signed with its private one.
        device: as in `plan`, like `workers` and `max_memory`.
        workers: threads.
        max_memory: own memory.
        on_event: is told what goes on.

    Returns:
        Numbers of `files`, `bytes`, `tensors`, and of tensors `recomputed`; what was `checked` and what `unchecked`.

    Raises:
        CheckError: something is not as it was written; the message names the file and, if it can, the tensor.
        SourceError: a source that a deep check needs is missing.
    """
    from safemerge_recipes.engine.folder import MANIFEST_FILE
    from safemerge_recipes.verification.verify import verify as check

    if not (Path(folder) / MANIFEST_FILE).exists() and Path(folder).is_dir():
        from safemerge_recipes.evaluation.experiments.results import check_results, is_results

        if is_results(Path(folder)):
            return check_results(Path(folder))
    deep = deep or sample is not None
    resources = resources_of(device if deep else "cpu", workers, max_memory)
    if public_key is not None:
        from safemerge_recipes.signing import check_signature

        check_signature(Path(folder), Path(public_key))
    result = check(Path(folder), resources, on_event, deep=deep, sample=sample, seed=seed)
    if deep:
        from safemerge_recipes.evaluation.recheck import check_scores

        checked, unchecked = check_scores(Path(folder))
        result["checked"] += checked
        result["unchecked"] += unchecked
    if public_key is not None:
        result["checked"].append(f"signature: every file, by the key of {Path(public_key).name}")
        result["unchecked"] = [line for line in result["unchecked"] if not line.startswith("who wrote")]
    return result


def sign(folder: str | Path, private_key: str | Path) -> Path:
    """Signs a finished output with a private key (PEM, elliptic curve), after verifying it; returns the signature.

    Raises:
        PlanError: the extra `sign` is not installed.
        CheckError: the output is not sound, or the key cannot be used.
    """
    from safemerge_recipes import signing

    verify(folder)
    return signing.sign(Path(folder), Path(private_key))


def compiled() -> bool:
    """Whether the compiled kernels are there; without them the same is computed by torch, more slowly."""
    from safemerge_recipes.weights.compiled import LIBRARY

    return LIBRARY is not None
