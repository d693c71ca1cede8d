"""What an earlier run left in the working folder, and which of its tensors still count.

A journal's tensors are compared with their bytes, because a power failure may have kept the line and lost the
data. A manifest's are not: its files were flushed before it was written, and the executor checks every reused
tensor against its digest when it seals the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.executors.threads import region_digest
from safemerge_recipes.engine.folder import MANIFEST_FILE
from safemerge_recipes.engine.journal import JOURNAL_FILE, Entries, read_journal
from safemerge_recipes.engine.manifest import read_manifest
from safemerge_recipes.errors import CheckError, SourceError, WriteError
from safemerge_recipes.planning.graph import ENGINE, Copy, Graph, Task
from safemerge_recipes.storage.layout import Layout


def finished(part: Path, graph: Graph, header: Mapping[str, Any], force: bool) -> dict[str, str | None]:
    """Tensor -> digest of every tensor that need not be written again.

    Args:
        part: the working folder.
        graph: the work as it is wanted now.
        header: the journal header that this run would write.
        force: go on even if inputs changed; their tensors are then written again.

    Raises:
        SourceError: inputs are not those of the interrupted run.
    """
    earlier, entries = read_journal(part / JOURNAL_FILE)
    if earlier is None:
        return _from_manifest(part, graph)
    before, now = earlier.get("inputs"), header["inputs"]
    for path in now:
        if not force and isinstance(before, dict) and path in before and before[path] != now[path]:
            raise SourceError(
                f"{path}: changed since the run into {part} was interrupted; expected the same inputs. "
                "Put the old file back, or say --force to write again what depends on it"
            )
    return _compared(part, graph, entries) if earlier.get("engine") == ENGINE else {}


def reusable(folder: Path, graph: Graph) -> bool:
    """Whether a finished output is laid out like the wanted one and shares at least one tensor with it."""
    return bool((folder / MANIFEST_FILE).exists() and _from_manifest(folder, graph))


def _from_manifest(folder: Path, graph: Graph) -> dict[str, str | None]:
    try:
        manifest = read_manifest(folder)
    except CheckError:
        return {}
    if manifest.engine != ENGINE or any(
        _place(folder, graph.layout, n) is None for n in range(len(graph.layout.files))
    ):
        return {}
    wanted = {task.slot.name: task.key for task in graph.tasks}
    return {name: digest for name, (key, digest) in manifest.tensors.items() if wanted.get(name) == key}


def _compared(part: Path, graph: Graph, entries: Entries) -> dict[str, str | None]:
    tasks = {task.slot.name: task for task in graph.tasks}
    descriptors: dict[int, int | None] = {}
    done: dict[str, str | None] = {}
    try:
        for name, (key, digest) in entries.items():
            task = tasks.get(name)
            if task is None or task.key != key:
                continue
            shard = task.slot.shard
            if shard not in descriptors:
                place = _place(part, graph.layout, shard)
                descriptors[shard] = None if place is None else os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            file = descriptors[shard]
            expected = _source_digest(task) if digest is None else digest
            if file is not None and region_digest(file, task.slot.offset, task.slot.nbytes) == expected:
                done[name] = expected
    except (OSError, WriteError):
        pass  # what could not be compared is written again
    finally:
        for descriptor in descriptors.values():
            if descriptor is not None:
                os.close(descriptor)
    return done


def _source_digest(task: Task) -> str | None:
    if not isinstance(task.work, Copy):
        return None
    ref = task.work.source
    file = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return region_digest(file, ref.offset, ref.nbytes)
    finally:
        os.close(file)


def _place(folder: Path, layout: Layout, shard: int) -> Path | None:
    """A weight file of an earlier run, sealed or not, if it has this layout's size and opening bytes."""
    name, header = layout.files[shard], layout.headers[shard]
    for path in (folder / f"{name}.part", folder / name):
        if path.is_file() and not path.is_symlink() and path.stat().st_size == layout.sizes[shard]:
            with open(path, "rb") as file:
                return path if file.read(len(header)) == header else None
    return None


def unseal(part: Path, layout: Layout) -> None:
    """Gives the weight files of an earlier run their working names back."""
    for name in layout.files:
        if (part / name).exists() and not (part / f"{name}.part").exists():
            os.rename(part / name, part / f"{name}.part")
