"""Time the engine beside its peers and the floor, in interleaved rounds, and keep the figures.

Every contestant is a whole child process. Before each timed run its output and its cache folder are removed,
dirty pages are flushed and the inputs are read once, so all start from a warm page cache and an empty cache
of their own. Contestants take turns (A B C A B C …), and ratios are formed within a round: machines drift,
and a ratio of runs seconds apart drifts less than a time. A contestant that fails is shown as failed.

    python -m benchmarks.timing.run --size llama-1.1b --rounds 5 --peer-rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.timing.architectures import SIZES
from benchmarks.timing.cases import CASES
from benchmarks.timing.contest import Bench
from benchmarks.timing.families import DATA, make_family
from benchmarks.timing.rounds import print_summary, run_case
from safemerge_recipes.weights import compiled

PLAIN = argparse.RawDescriptionHelpFormatter
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, system, versions."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ("torch", "safetensors", "transformers", "peft", "mergekit", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["compiled kernels"] = str(compiled.VERSION) if compiled.LIBRARY is not None else None
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "system": platform.system(),
        "python": platform.python_version(), "versions": versions, "load_before": os.getloadavg()[0],
    }  # fmt: skip


def without_paths(value: Any, places: dict[str, str]) -> Any:
    """Return a record with the folders of this machine replaced by their names."""
    text = json.dumps(value, ensure_ascii=False)
    for path, name in sorted(places.items(), key=lambda item: -len(item[0])):
        text = text.replace(path, name)
    return json.loads(text)


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=PLAIN)
    real = [size for size in SIZES if not SIZES[size]().sparse]
    parser.add_argument("--size", choices=real, default="llama-1.1b")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, help="rounds of the slow peers (default: all)")
    parser.add_argument("--quick", action="store_true", help="the tiny family, one round: does it all run?")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/work", help="outputs, logs, caches")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--device", default="cpu", help="where the engine computes: cpu, cuda (the peers stay)")
    parser.add_argument("--mergekit-args", default="", help="more options for mergekit-yaml, in one string")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a child is killed")
    parser.add_argument("--label", help="name of the result files (default: the size, or quick)")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = "tiny", 1
    if options.peer_rounds is None:
        options.peer_rounds = options.rounds
    return options


def environment(work: Path) -> dict[str, str]:
    """Return the environment of every child: no network, caches of its own, the package importable."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    own = {"XDG_CACHE_HOME": str(work / "cache"), "HF_HOME": str(work / "hf"), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **offline, **own}


def main() -> int:
    options = options_given()
    work, data = options.work.resolve(), options.data.resolve()
    work.mkdir(parents=True, exist_ok=True)
    family = make_family(options.size, data)
    bench = Bench(
        family, data, work, environment(work), ROOT, options.workers, options.max_memory,
        tuple(options.mergekit_args.split()), options.device,
    )  # fmt: skip
    record: dict[str, Any] = {
        "size": options.size, "rounds": options.rounds, "peer_rounds": options.peer_rounds,
        "workers": options.workers, "max_memory": options.max_memory, "device": options.device,
        "machine": machine(), "cases": [],
    }  # fmt: skip
    for name in options.cases or CASES:
        print(f"\n{name}", flush=True)
        if name.startswith("plan-"):
            make_family(name.removeprefix("plan-"), data)
        try:
            case = CASES[name](bench)
        except subprocess.CalledProcessError as error:
            print(f"  FAILED: the readings for τ could not be taken (exit code {error.returncode})")
            failed = {"readings": f"exit code {error.returncode}"}
            record["cases"].append({"name": name, "title": name, "failed": failed})
            continue
        made = run_case(case, bench, options.rounds, options.peer_rounds, options.timeout)
        print_summary(made)
        record["cases"].append(made)
        _keep(record, options.label or ("quick" if options.quick else options.size), bench)
    return 1 if any(case["failed"] for case in record["cases"]) else 0


def _keep(record: dict[str, Any], label: str, bench: Bench) -> None:
    # Kept after every case, so that a run cut short loses nothing.
    from benchmarks.timing.picture import draw

    RESULTS.mkdir(exist_ok=True)
    places = {str(bench.data): "DATA", str(bench.work): "WORK", str(ROOT): "REPO", sys.prefix: "VENV"}
    clean = without_paths(record, places)
    (RESULTS / f"{label}.json").write_text(json.dumps(clean, indent=1, ensure_ascii=False) + "\n")
    draw(clean, RESULTS / f"{label}.svg")


if __name__ == "__main__":
    sys.exit(main())
