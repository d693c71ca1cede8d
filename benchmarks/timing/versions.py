"""Two checkouts of the project side by side: start-up, wall and CPU time, own memory, run by run in turns.

    python -m benchmarks.timing.versions OLD/.venv/bin/safemerge NEW/.venv/bin/safemerge --size llama-0.3b --rounds 5

Ratios are formed within a round (new by old); the table shows medians and the range of the ratios. Outputs and caches
are removed before each run, the inputs are read once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from statistics import median

import yaml

from benchmarks.timing.architectures import SIZES
from benchmarks.timing.families import DATA, make_family
from benchmarks.timing.process import Usage, measure

ROLES = ("base", "aligned", "finetuned", "safety")
CASES = ("help", "validate", "linear", "ties", "dare_linear", "adapters", "gate-full")


def recipe_of(case: str, family: Path) -> dict[str, object]:
    """What a case merges: all of full checkpoints, adapters behind a gate, or the readings of full checkpoints."""
    sources: dict[str, object] = {role: str(family / role) for role in ROLES}
    if case == "adapters":
        sources |= {role: {"adapter": str(family / f"{role}-adapter")} for role in ("finetuned", "safety")}
    gate = {"fraction": 0.5} if case in ("adapters", "gate-full") else {"always": True, "scope": ["*"]}
    method = case if case in ("linear", "ties", "dare_linear") else "linear"
    return {"sources": sources, "gate": gate, "merge": {"method": method}}


def run(program: Path, case: str, recipe: Path, work: Path) -> Usage:
    """One case by one program."""
    for name in ("out", "out.part", "cache"):
        shutil.rmtree(work / name, ignore_errors=True)
    command = {
        "help": ["--help"],
        "validate": ["validate", str(recipe)],
        "gate-full": ["plan", str(recipe), "--json", "--workers", "2"],
    }.get(case, ["run", str(recipe), "--output", str(work / "out"), "--json", "--workers", "2"])
    usage = measure(
        [str(program), *command], work / "log", {**os.environ, "SAFEMERGE_CACHE": str(work / "cache")}, work
    )
    if usage.code:
        raise SystemExit(f"{program} {case}: exit code {usage.code}\n{(work / 'log.err').read_text()[-2000:]}")
    return usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the program `safemerge` of one checkout")
    parser.add_argument("new", type=Path, help="that of another")
    parser.add_argument("--size", choices=[name for name in SIZES if "671b" not in name], default="tiny")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    family = make_family(options.size, options.data)
    programs = (options.old.absolute(), options.new.absolute())
    print(f"{options.size}, {options.rounds} rounds, load {os.getloadavg()[0]:.1f} before")
    columns = ("case", "old s", "new s", "new by old", "CPU s", "by old", "own MB", "by old")
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    with tempfile.TemporaryDirectory(dir=options.data) as folder:
        work = Path(folder)
        for case in options.cases:
            recipe = work / f"{case}.yaml"
            recipe.write_text(yaml.safe_dump(recipe_of(case, family), sort_keys=False))
            rounds = []
            for number in range(options.rounds + 1):
                order = programs if number % 2 else programs[::-1]
                found = {program: run(program, case, recipe, work) for program in order}
                rounds.append((found[programs[0]], found[programs[1]]))
            print(row(case, rounds[1:]), flush=True)  # the first round warms the page cache
    print(f"load {os.getloadavg()[0]:.1f} after")


def row(case: str, rounds: list[tuple[Usage, Usage]]) -> str:
    """One line of the table."""
    cells = [case]
    for name, unit, digits in (("wall", 1, 3), ("cpu", 1, 3), ("peak_own", 1e6, 0)):
        pairs = [(getattr(old, name) / unit, getattr(new, name) / unit) for old, new in rounds]
        ratios = sorted(new / old for old, new in pairs if old)
        before, after = (f"{median(side):.{digits}f}" for side in zip(*pairs, strict=True))
        cells += [before, after] if name == "wall" else [f"{before} → {after}"]
        cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})" if ratios else "–")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
