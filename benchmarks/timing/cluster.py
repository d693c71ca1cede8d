"""What a merge takes on machines that are not at hand: real plans, and a simulated cluster that carries them out.

    python -m benchmarks.timing.cluster --data benchmarks/data

The plans are made by the program over sparse files with real headers. A task is one weight file, as for Ray and for
part workers: read, compute, hash, write. Its seconds follow from rates that were measured on one core and from what
the node's disk or network gives each of the tasks under way there; tasks go to the next free place in order. Inputs are
hashed on all cores, which the other work then lacks, so that the seconds of both are added. Nothing is said of
failures, stragglers or a storage system that gives less to many than to one.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing.architectures import ROLES
from benchmarks.timing.families import DATA, make_family
from benchmarks.timing.run import RESULTS, machine
from benchmarks.timing.stored import allow_holes
from safemerge_recipes.api import load_recipe
from safemerge_recipes.events import ignore
from safemerge_recipes.pipeline.opening import resolve
from safemerge_recipes.pipeline.preparing import prepare
from safemerge_recipes.planning.graph import Copy, Graph
from safemerge_recipes.storage.workers import Resources

SIZES = {"8 B": "sparse-8b", "70 B": "sparse-70b", "405 B": "sparse-405b", "671 B": "headers-671b"}


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured on one core: docs/performance.md. Seconds a byte, or an element."""

    sha256: float = 0.55e-9
    linear: float = 0.64e-9
    gate: float = 25e-9
    """The adaptive gate of full checkpoints: 14 s on two cores for 112 matrices of 1.1 B elements in all."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine: cores, and bytes a second that it reads and writes in all."""

    cores: int
    reads: float
    writes: float


LOCAL = Node(16, 6e9, 3e9)
"""Sources and output on an NVMe disk of its own."""
REMOTE = Node(16, 3e9, 1.5e9)
"""On shared or object storage, by a network of 25 Gbit/s."""


def planned(size: str, data: Path, work: Path) -> tuple[Graph, dict[str, Any]]:
    """The graph of a recipe that merges every matrix, and what planning it took."""
    allow_holes()
    family = make_family(size, data)
    path = work / f"{size}.yaml"
    sources = {role: str(family / role) for role in ROLES if role != "base"}  # with it the gate would be measured
    path.write_text(json.dumps({"sources": sources, "gate": {"always": True}, "merge": {"alpha": 0.8}}))
    began, before = time.perf_counter(), _own()
    prepared = prepare(resolve(load_recipe(path)), Resources(2, 2_000_000_000), ignore)
    graph = prepared.graph
    return graph, {
        "seconds": time.perf_counter() - began, "own_memory": _own() - before, "tensors": len(graph.tasks),
        "files": len(graph.layout.files), "bytes_read": graph.bytes_read, "bytes_written": graph.bytes_written,
        "bytes_of_sources": sum(one.size for one in prepared.identities), "load": os.getloadavg()[0],
    }  # fmt: skip


def _own() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def simulate(
    graph: Graph, sources: int, node: Node, nodes: int, rates: Rates, *, known: bool, gate: bool
) -> dict[str, float]:
    """Seconds of each phase on so many nodes.

    Args:
        graph: the work.
        sources: bytes of all source files.
        node: each machine.
        nodes: how many.
        rates: of one core.
        known: whether the sources' sha256 is remembered.
        gate: whether full checkpoints are measured.
    """
    places = nodes * node.cores
    elements = sum(task.slot.nbytes // 2 for task in graph.tasks if len(task.slot.shape) > 1)
    measure = 0.0
    if gate:  # aligned, base and fine-tuned, two bytes an element
        measure = max(elements * rates.gate / places, 3 * 2 * elements / (nodes * node.reads))
    ends = [0.0] * places
    for _, tasks in graph.by_file():
        under_way = min(node.cores, max(1, len(graph.layout.files) // nodes))
        read = sum(task.bytes_read for task in tasks)
        written = sum(task.slot.nbytes for task in tasks)
        merged = sum(task.slot.nbytes // 2 for task in tasks if not isinstance(task.work, Copy))
        seconds = read * under_way / node.reads + written * under_way / node.writes
        seconds += written * rates.sha256 + merged * rates.linear
        heapq.heapreplace(ends, ends[0] + seconds)
    write = max(ends)
    hashing = 0.0 if known else max(sources * rates.sha256 / places, sources / (node.reads * nodes))
    return {"measure": measure, "write": write, "hash": hashing, "all": measure + write + hashing}


WAYS = {
    "one node, local disk": (LOCAL, 1, False),
    "the same, inputs known": (LOCAL, 1, True),
    "8 nodes": (REMOTE, 8, False),
    "8 nodes, inputs known": (REMOTE, 8, True),
    "32 nodes": (REMOTE, 32, False),
}
"""way -> (node, nodes, inputs known); by Ray or by parts is the same here."""


def main() -> None:
    """Plans all sizes, simulates all ways, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--result", type=Path, default=RESULTS / "cluster.json")
    given = parser.parse_args()
    given.data.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "rates": asdict(Rates()), "plans": {}, "seconds": {}}
    for name, size in SIZES.items():
        graph, plan = planned(size, given.data, given.data)
        found["plans"][name] = plan
        found["seconds"][name] = {
            way: simulate(graph, plan["bytes_of_sources"] * 4 // 3, node, nodes, Rates(), known=known, gate=True)
            for way, (node, nodes, known) in WAYS.items()
        }  # fmt: skip
        print(name, json.dumps(plan), flush=True)
        for way, seconds in found["seconds"][name].items():
            nodes = WAYS[way][1]
            parts = " ".join(f"{phase} {value / 60:.1f}" for phase, value in seconds.items())
            print(f"  {way}: minutes {parts}; node hours {nodes * seconds['all'] / 3600:.2f}", flush=True)
    given.result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
