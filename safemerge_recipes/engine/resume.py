"""What an earlier run left in the working folder, and which of its tensors still count.

A journal's tensors are compared with their bytes, because a power failure may have kept the line and lost the
data. A manifest's are not: its files were flushed before it was written, and the executor checks every reused
tensor against its digest when it seals the file.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.folder import MANIFEST_FILE
from safemerge_recipes.engine.journal import JOURNAL_FILE, Entries, read_journal
from safemerge_recipes.engine.local_store import LocalStore
from safemerge_recipes.engine.manifest import read_manifest
from safemerge_recipes.engine.produce import digest_of, produce
from safemerge_recipes.engine.seal import digest_of_region
from safemerge_recipes.engine.store import Store
from safemerge_recipes.errors import CheckError, SourceError, WriteError
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.planning.graph import ENGINE, Graph, Task
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.identity import differs_here
from safemerge_recipes.storage.reader import Reader


def finished(part: Path, store: Store, graph: Graph, header: Mapping[str, Any], force: bool) -> dict[str, str | None]:
    """Tensor -> digest of every tensor that need not be written again.

    Args:
        part: the working folder, which holds the journal.
        store: where the weight files are.
        graph: the work as it is wanted now.
        header: the journal header that this run would write.
        force: go on even if inputs changed; their tensors are then written again.

    Raises:
        SourceError: inputs are not those of the interrupted run.
    """
    earlier, entries = read_journal(part / JOURNAL_FILE)
    if earlier is None:
        return _from_manifest(part, store, graph)
    for path in header["inputs"]:
        if not force and _changed(path, earlier, header):
            raise SourceError(
                f"{path}: changed since the run into {part} was interrupted; expected the same inputs. "
                "Put the old file back, or say --force to write again what depends on it"
            )
    return _compared(store, graph, entries) if earlier.get("engine") == ENGINE else {}


def _changed(path: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an input of an interrupted run is another file now, as far as both could see."""
    before, seen = earlier.get("inputs"), earlier.get("here")
    if isinstance(before, dict) and path in before and before[path] != now["inputs"][path]:
        return True
    known = seen.get(path) if isinstance(seen, dict) else None
    return isinstance(known, str) and differs_here(known, now.get("here", {}).get(path, known))


def reusable(folder: Path, graph: Graph) -> bool:
    """Whether a finished output is laid out like the wanted one and shares at least one tensor with it."""
    return bool((folder / MANIFEST_FILE).exists() and _from_manifest(folder, LocalStore(folder, graph.layout), graph))


def _from_manifest(folder: Path, store: Store, graph: Graph) -> dict[str, str | None]:
    try:
        manifest = read_manifest(folder)
    except CheckError:
        return {}
    if manifest.engine != ENGINE or len(store.list()) < len(graph.layout.files):
        return {}
    wanted = {task.slot.name: task.key for task in graph.tasks}
    return {name: digest for name, (key, digest) in manifest.tensors.items() if wanted.get(name) == key}


def _compared(store: Store, graph: Graph, entries: Entries) -> dict[str, str | None]:
    tasks = {task.slot.name: task for task in graph.tasks}
    there = store.list()
    done: dict[str, str | None] = {}
    try:
        with Reader() as reader:
            for name, (key, digest) in entries.items():
                task = tasks.get(name)
                if task is None or task.key != key or task.slot.shard not in there:
                    continue
                expected = _source_digest(task, reader) if digest is None else digest
                if digest_of_region(store, task.slot.shard, task.slot.offset, task.slot.nbytes) == expected:
                    done[name] = expected
    except (OSError, SourceError, WriteError):
        pass  # what could not be compared is written again
    finally:
        store.close()
    return done


def _source_digest(task: Task, reader: Reader) -> str | None:
    if task.work.copied is None:
        return None
    return digest_of(produce(task, Tools(reader, Arena(), 0), threading.Event()))
