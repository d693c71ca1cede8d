"""Ray beside the local executor at as many workers: the same merge in turn, the cluster's start aside.

    python -m benchmarks.timing.executors --size llama-1.1b --rounds 3

One process plans and drives; the cluster of this machine is started before and kept. Whether inputs are known or not,
both read the same warm files and write into a fresh folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.floor import run_floor, weight_files
from benchmarks.timing.families import DATA, make_family
from benchmarks.timing.rounds import SETTLE
from benchmarks.timing.run import RESULTS, machine
from safemerge_recipes import api

ROLES = ("aligned", "finetuned", "safety")


def recipe(size: str, data: Path, method: str) -> Path:
    """A merge of every matrix of three full models, into files of 256 MB."""
    family, path = make_family(size, data), data / f"{size}-executors.yaml"
    sources = {role: str(family / role) for role in ROLES}
    merge, output = {"method": method, "alpha": 0.8}, {"path": "unused", "max_shard_size": "256MB"}
    path.write_text(json.dumps({"sources": sources, "gate": {"always": True}, "merge": merge, "output": output}))
    return path


def timed(path: Path, out: Path, executor: str, workers: int, inputs: list[Path], fresh: Path | None) -> dict[str, Any]:
    """One run; `fresh` is a cache to be emptied first, so that inputs are hashed."""
    shutil.rmtree(out, ignore_errors=True)
    if fresh is not None:
        shutil.rmtree(fresh, ignore_errors=True)
    os.sync()
    time.sleep(SETTLE)
    run_floor(inputs, None, 0, 2)
    began = time.perf_counter()
    result = api.run(path, out, executor=executor, workers=workers)
    return {"wall": time.perf_counter() - began, "load": os.getloadavg()[0], **dict(result.timings)}


def main() -> None:
    """Runs both in turn and writes the record."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="llama-1.1b")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=DATA.parent / "work")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="linear")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    path, cache = recipe(given.size, given.data, given.method), given.work.resolve() / "cache"
    os.environ["SAFEMERGE_CACHE"] = str(cache)  # of workers, too: they are started with it
    inputs = [file for role in ROLES for file in weight_files(given.data.resolve() / given.size / role)]
    ray.init(num_cpus=given.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    record: dict[str, Any] = {"machine": machine(), "size": given.size, "method": given.method, "rounds": []}
    try:
        for executor in ("ray", "local"):  # imports, and kept digests of the inputs
            timed(path, given.work / "out", executor, given.workers, inputs, None)
        for _ in range(given.rounds):
            row = {
                f"{executor}, {kind}": timed(path, given.work / "out", executor, given.workers, inputs, fresh)
                for kind, fresh in (("known", None), ("first", cache))
                for executor in ("local", "ray")
            }
            record["rounds"].append(row)
            print({name: round(found["wall"], 2) for name, found in row.items()}, flush=True)
    finally:
        ray.shutdown()
        shutil.rmtree(given.work / "out", ignore_errors=True)
    for kind in ("known", "first"):
        ratios = [row[f"ray, {kind}"]["wall"] / row[f"local, {kind}"]["wall"] for row in record["rounds"]]
        record[f"ratio, {kind}"] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
        print(kind, record[f"ratio, {kind}"], flush=True)
    (RESULTS / f"executors-{given.size}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
