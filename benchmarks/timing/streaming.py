"""A merge whose output fits no disk: from plan to manifest, into a store that hashes what it is sent and drops it.

    python -m benchmarks.timing.streaming --size sparse-70b --data benchmarks/data
    python -m benchmarks.timing.streaming --size blocks-70b --of checkpoints

The models are sparse files with real headers, so that reading costs what memory costs and no disk holds them; every
byte of them is read, merged, hashed and sent as it would be from a disk. Of adapters (on every matrix, alignment an
adapter too) the numbers are real: each matrix is measured and decided, and the output holds their products. The store
is an fsspec file system of this process that keeps small objects and forgets weights; the program takes it for object
storage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from benchmarks.timing.architectures import SIZES
from benchmarks.timing.families import ADAPTERS, DATA, make_family, write_adapters
from benchmarks.timing.run import RESULTS, machine
from benchmarks.timing.stored import allow_holes
from safemerge_recipes import api
from safemerge_recipes.storage import remote


class Dropped(AbstractBufferedFile):
    """An upload of which only size and sha256 are kept."""

    def _initiate_upload(self) -> None:
        self.digest = hashlib.sha256()

    def _upload_chunk(self, final: bool = False) -> bool:
        self.buffer.seek(0)
        self.digest.update(self.buffer.read())
        if final:
            self.fs.dropped[self.path] = self.tell(), self.digest.hexdigest()
        return True

    def discard(self) -> None:
        """Forgets it."""


class Dropping(MemoryFileSystem):
    """Objects in memory, but for weight files."""

    protocol = ("drop",)
    store: dict[str, MemoryFile] = {}  # noqa: RUF012  # as its base has it
    pseudo_dirs = [""]  # noqa: RUF012
    dropped: dict[str, tuple[int, str]] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("drop://").strip("/")

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **how: Any) -> Any:
        if mode == "wb" and path.endswith(".safetensors"):
            return Dropped(self, path, mode, block_size or 1 << 26, autocommit=True, cache_options=None)
        return super()._open(path, mode, block_size, **how)

    def info(self, path: str, **how: Any) -> dict[str, Any]:
        """Size of a dropped one, else as usual."""
        path = self._strip_protocol(path)
        if path in self.dropped:
            return {"name": path, "size": self.dropped[path][0], "type": "file"}
        found: dict[str, Any] = super().info(path, **how)
        return found

    def ls(self, path: str, detail: bool = True, **how: Any) -> list[Any]:
        """Dropped ones too."""
        path = self._strip_protocol(path)
        try:
            found = super().ls(path, detail=True, **how)
        except FileNotFoundError:
            found = []
        found += [self.info(one) for one in self.dropped if one.rpartition("/")[0] == path]
        return found if detail else [one["name"] for one in found]


def use() -> str:
    """Makes the file system known; the URL of an output in it."""
    fsspec.register_implementation("drop", Dropping, clobber=True)
    remote.SCHEMES["drop"] = ""
    return "drop://somewhere/out"


class Watch(threading.Thread):
    """The most anonymous memory that this process had, over all and in each tenth of a minute."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.over, self.trace = self._now(), threading.Event(), [0]

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    @property
    def most(self) -> int:
        return max(self.trace)

    def run(self) -> None:
        """Looks every 20 ms."""
        began = time.monotonic()
        while not self.over.wait(0.02):
            if time.monotonic() - began > 6 * len(self.trace):
                self.trace.append(0)
            self.trace[-1] = max(self.trace[-1], self._now())


def recipe(size: str, data: Path, of: str, method: str) -> Path:
    """A recipe over a family of holes: of three models, everything merged; of adapters on one, gated."""
    family, path = make_family(size, data), data / f"{size}-{of}-stream.yaml"
    sources: dict[str, Any] = {role: str(family / role) for role in ("aligned", "finetuned", "safety")}
    gate: dict[str, Any] = {"always": True}
    if of == "adapters":
        if not all((family / adapter / "adapter_config.json").exists() for adapter in ADAPTERS):
            write_adapters(family, SIZES[size](), 0)
        roles = {"aligned": "alignment", "finetuned": "finetuned", "safety": "safety"}
        sources = {role: {"adapter": str(family / f"{name}-adapter")} for role, name in roles.items()}
        sources["aligned"]["on"] = "base"
        sources, gate = {"base": str(family / "base"), **sources}, {"tau": 0.7}
    merge = {"method": method, "alpha": 0.8}
    path.write_text(json.dumps({"sources": sources, "gate": gate, "merge": merge}))
    return path


def made(size: str, data: Path, of: str, method: str) -> Path:
    """The same, in a process of its own: random numbers need torch, whose memory is not the merge's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(recipe, size, data, of, method).result()


def merge(size: str, data: Path, of: str, workers: int, memory: str, method: str) -> dict[str, Any]:
    """Plans and merges a family into the store; what that took."""
    allow_holes()
    path, out = made(size, data, of, method), use()
    watch, began, load = Watch(), time.perf_counter(), os.getloadavg()
    watch.start()
    cpu = time.process_time()
    result = api.run(path, out, force=True, workers=workers, max_memory=memory)
    watch.over.set()
    wrong = [name for name, digest in result.files.items() if Dropping.dropped[f"/somewhere/out/{name}"][1] != digest]
    assert not wrong, wrong
    assert Dropping().cat_file("/somewhere/out/safemerge_manifest.json")
    return {
        "size": size, "of": of, "method": method, "workers": workers, "max_memory": memory,
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - cpu, "own_memory": watch.most,
        "own_memory_before": watch.before, "own_memory_by_six_seconds": watch.trace,
        "bytes_written": result.bytes_written,
        "actions": dict(Counter(tensor.action for tensor in result.plan.plan.tensors)),
        "bytes_read": result.plan.graph.bytes_read, "timings": dict(result.timings), "load": [*load, *os.getloadavg()],
    }  # fmt: skip


def main() -> None:
    """Merges and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sparse-70b")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--of", choices=["adapters", "checkpoints"], default="adapters")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-memory", default="256MB")
    parser.add_argument("--method", default="linear")
    given = parser.parse_args()
    given.data.mkdir(parents=True, exist_ok=True)
    found = merge(given.size, given.data, given.of, given.workers, given.max_memory, given.method)
    print(json.dumps(found, indent=1))
    record = {"machine": machine(), **found}
    (RESULTS / f"streaming-{given.size}-{given.of}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
