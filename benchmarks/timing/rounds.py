"""Timing one case: interleaved rounds, ratios within a round, medians and ranges. Knows no peer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.floor import run_floor
from benchmarks.timing.contest import Bench, Case, Contestant
from benchmarks.timing.process import measure

SETTLE = 5.0
"""Seconds between removing an output and a timed run that writes one. The host of a virtual machine takes freed memory
back after a second or two; without the wait, who finishes before that pays nothing for new pages, and who does not
pays more than for all the rest."""


def run_case(case: Case, bench: Bench, rounds: int, peer_rounds: int, timeout: float) -> dict[str, Any]:
    """Run a case to its end and return its record: usages by round, ratios to the first contestant, check."""
    for contestant in case.contestants:
        if contestant.warm:
            subprocess.run(contestant.warm, capture_output=True, env=bench.env, cwd=bench.root, check=False)
    taken: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for number in range(rounds):
        row: dict[str, Any] = {}
        for contestant in case.contestants:
            if contestant.name in failed or (contestant.peer and number >= peer_rounds):
                continue
            usage, problem = _run_contestant(case, contestant, bench, timeout)
            if problem:
                failed[contestant.name] = problem
                print(f"  {contestant.name}: FAILED\n    " + problem.replace("\n", "\n    "), flush=True)
            else:
                row[contestant.name] = usage
        taken.append(row)
        first = row.get(case.contestants[0].name)
        for name, usage in row.items():
            print(f"  round {number + 1}  {_line(name, usage, first)}", flush=True)
    record = {
        "name": case.name, "title": case.title, "rounds": taken, "failed": failed,
        "commands": {c.name: c.command for c in case.contestants},
        "summary": summarise([c.name for c in case.contestants], taken),
    }  # fmt: skip
    if case.check:
        try:
            record["agreement"] = case.check()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            record["agreement"] = {"not compared": f"{type(error).__name__}: {error}"}
        print(f"  agreement: {json.dumps(record['agreement'])[:500]}", flush=True)
    for contestant in case.contestants:
        if contestant.output:
            shutil.rmtree(contestant.output, ignore_errors=True)
    return record


def _run_contestant(
    case: Case, contestant: Contestant, bench: Bench, timeout: float
) -> tuple[dict[str, Any], str | None]:
    cache = bench.work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    if contestant.output:
        shutil.rmtree(contestant.output, ignore_errors=True)
        # The floor writes one bare file into a folder that is there; a merge makes its own folder.
        ready = contestant.output if contestant.name.startswith("floor") else contestant.output.parent
        ready.mkdir(parents=True, exist_ok=True)
    log = bench.log(case.name, contestant.name)
    if contestant.before:
        first = measure(contestant.before, log, bench.env, bench.root, timeout)
        if first.code:
            return {}, f"untimed first run: {_problem(log, first.code)}"
    os.sync()
    if contestant.output and not contestant.before:
        time.sleep(SETTLE)
    if case.inputs:
        run_floor(case.inputs, None, 0, 2)
    usage = measure(contestant.command, log, bench.env, bench.root, timeout)
    if usage.code:
        return {}, _problem(log, usage.code)
    return {**asdict(usage), "said": _said(log)}, None


def _problem(log: Path, code: int) -> str:
    lines = log.with_name(log.name + ".err").read_text(errors="replace").strip().splitlines()
    return "\n".join([f"exit code {code}", *lines[-8:]])


def _said(log: Path) -> Any:
    # The engine's own summary, to set its projected peak and bytes beside what was measured.
    try:
        value = json.loads(log.read_text())
    except ValueError:
        return None
    return value.get("summary") if isinstance(value, dict) else None


def summarise(names: list[str], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians by contestant, and the median and range over rounds of its ratio to the first one."""
    found: dict[str, Any] = {}
    for name in names:
        rows = [row[name] for row in rounds if name in row]
        if not rows:
            continue
        keys = ("wall", "cpu", "peak_rss", "peak_own", "max_rss")
        found[name] = {"rounds": len(rows), **{key: median(row[key] for row in rows) for key in keys}}
        pairs = [(row[name], row[names[0]]) for row in rounds if name in row and names[0] in row]
        ratios = [it["wall"] / first["wall"] for it, first in pairs]
        if ratios:
            found[name]["ratio"] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    return found


def _line(name: str, usage: dict[str, Any], first: dict[str, Any] | None) -> str:
    ratio = f"{usage['wall'] / first['wall']:7.2f}×" if first else " " * 8
    sizes = f"rss {usage['peak_rss'] / 1e6:7.0f} MB  own {usage['peak_own'] / 1e6:7.0f} MB"
    return f"{name:34} {usage['wall']:8.2f} s {ratio}  cpu {usage['cpu']:8.2f} s  {sizes}"


def print_summary(record: dict[str, Any]) -> None:
    """Print the medians of a case and its ratios with their range."""
    print(f"  {'median':34} {'wall':>8}    {'ratio (range)':22} {'cpu':>8}    {'rss':>7}  {'own':>7} MB")
    for name, row in record["summary"].items():
        ratio = row.get("ratio")
        text = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-"
        rss, own = row["peak_rss"] / 1e6, row["peak_own"] / 1e6
        print(f"  {name:34} {row['wall']:8.2f} s  {text:22} {row['cpu']:8.2f} s  {rss:7.0f}  {own:7.0f}")
