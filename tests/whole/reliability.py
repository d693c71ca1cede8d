"""Faults over every verb as a campaign that goes on where it stopped, and the table of docs/reliability.md.

python -m tests.whole.reliability --kills 500 --results FILE docs/reliability.md   # `make reliability`
python -m tests.whole.reliability --minutes 30                                     # `make soak`: ends at the first loss

A campaign is a list of steps that its seed decides. Each step's result is a line of the results file, so that a
campaign that was stopped goes on, and the table is made of the file alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.whole import faults
from tests.whole.faults import KILL, Bench, Row, Rows, Verb, at_call, table

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
ERRORS = ("EIO", "ENOSPC", "EINTR")
FIFTY = ("evaluate", "sweep", "report", "publish")
"""Verbs of which each gets a tenth of the kills, up to fifty: what they write is shown to others."""
SLOW = ("train-adapter", "probe", "compare")
"""Verbs that take seconds, and are killed less often."""


def kill(bench: Bench, verb: Verb, dice: random.Random, times: int = 1) -> str:
    """Kills a verb at a call, then again while the same command goes on, `times` in all.

    What goes on has less left to do, so each kill comes earlier than the one before may have.
    """
    calls = bench.expected(verb)[2]
    return bench.attempt(
        verb, *(at_call("kill", dice.randrange(1, max(2, calls // (1 + number) + 1))) for number in range(times))
    )


def fail(bench: Bench, verb: Verb, dice: random.Random, how: str) -> str:
    """Lets one call of a verb fail with an error."""
    return bench.attempt(verb, at_call(how, dice.randrange(1, bench.expected(verb)[2] + 1)))


def writing(bench: Bench) -> list[Verb]:
    """The verbs that change the disk."""
    return [verb for verb in bench.verbs if bench.expected(verb)[2]]


# The campaign


def steps(bench: Bench) -> Iterator[tuple[str, Verb]]:
    """(what is done, to which verb), without end: each round kills every verb that writes, three times in a row."""
    active = writing(bench)
    number = 0
    while True:
        for verb in active:
            if verb.name not in SLOW or number % 3 == 0:
                yield "kill", verb
            if verb.name in FIFTY and number % 2 == 0:
                yield "kill", verb
            if number < len(ERRORS):
                yield ERRORS[number], verb
        for verb in bench.verbs:
            if number < 6:
                yield "plant", verb
            if number < len(faults.LASTING) and not verb.scores:
                yield f"lasting {number}", verb
            if verb.name in ("verify", "report") and number < 10:
                yield from (("flip", verb) for _ in range(10))
        number += 1


def step(bench: Bench, what: str, verb: Verb, dice: random.Random) -> None:
    """Carries one out; the bench's rows say what came of it."""
    if what == "kill":
        kill(bench, verb, dice, 3)
    elif what == "plant":
        bench.plant(verb, dice.choice(list(faults.PLANTED)), dice)
    elif what == "flip":
        bench.flip(verb, dice)
    elif what.startswith("lasting "):
        bench.attempt(verb, faults.LASTING[int(what.split()[1])])
    else:
        fail(bench, verb, dice, what)


def campaign(bench: Bench, kills: int, results: Path, seed: int = 2026) -> Rows:
    """Goes on until so many runs were killed, a tenth of each of `FIFTY`; returns the rows of the whole file."""
    done = read_results(results)
    results.write_text("".join(json.dumps(line) + "\n" for line in done))  # without a torn last line
    rows = summed(done)
    for number, (what, verb) in enumerate(steps(bench)):
        if _enough(rows, kills, bench, number):
            return rows
        if number < len(done):
            continue
        bench.rows.clear()
        begun = time.monotonic()
        step(bench, what, verb, random.Random(f"{seed} {number}"))
        line = {
            "step": number, "what": what, "verb": verb.name, "seconds": round(time.monotonic() - begun, 1),
            "rows": [[kind, name, row.tried, row.struck, row.lost] for (kind, name), row in bench.rows.items()],
        }  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        rows = summed([{"rows": []}, line], rows)
    return rows


def _enough(rows: Rows, kills: int, bench: Bench, number: int) -> bool:
    struck = {verb: row.struck for (kind, verb), row in rows.items() if kind == KILL}
    known = [verb.name for verb in bench.verbs if verb.name in FIFTY]
    rounds = 6 * len(bench.verbs)  # the errors, the plants and what lasts came at least once
    return (
        sum(struck.values()) >= kills
        and all(struck.get(name, 0) >= min(50, kills // 10) for name in known)
        and number > rounds
    )


def read_results(results: Path) -> list[dict[str, Any]]:
    """The steps of a results file, by their number; a torn last line is none."""
    found = []
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def summed(lines: list[dict[str, Any]], rows: Rows | None = None) -> Rows:
    """The rows of all steps."""
    found: Rows = {} if rows is None else rows
    for line in lines:
        for kind, verb, tried, struck, lost in line["rows"]:
            found.setdefault((kind, verb), Row()).add(Row(tried, struck, lost))
    return found


def soak(bench: Bench, minutes: float, dice: random.Random) -> None:
    """Goes on with faults until the time is over, or something is lost."""
    until, todo = time.monotonic() + 60 * minutes, writing(bench)
    while time.monotonic() < until and not losses(bench.rows):
        verb = dice.choice(todo)
        how = dice.choice(("kill", "kill", "kill", "plant", *ERRORS))
        if how == "kill":
            kill(bench, verb, dice, dice.randint(1, 3))
        else:
            step(bench, how, verb, dice)


def losses(rows: Rows) -> list[str]:
    """Everything that was lost, in words."""
    return [one for row in rows.values() for one in row.lost]


def write_table(rows: Rows, page: Path, told: str) -> None:
    """Puts the tables into a page, between their marks."""
    text = page.read_text()
    killed = {key: row for key, row in rows.items() if key[0] == KILL}
    made = f"{told}\n\n{table(rows)}\n\nThe kills by verb:\n\n{table(killed, 1)}"
    page.write_text(f"{text[: text.index(BEGIN)]}{BEGIN}\n{made}\n{text[text.index(END) :]}")


def main() -> int:
    """The program; ends with 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="page whose table is written anew")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--results", type=Path, help="file of what is done; a campaign goes on from there")
    parser.add_argument("--only", help="of one verb alone")
    parser.add_argument("--with", type=Path, nargs="*", default=[], dest="others", help="further files of results")
    parser.add_argument("--minutes", type=float, help="go on for so long instead")
    parser.add_argument("--seed", type=int, default=2026)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), scoring=not asked.only)
        bench.verbs = tuple(verb for verb in bench.verbs if asked.only in (None, verb.name))
        try:
            if asked.minutes:
                soak(bench, asked.minutes, random.Random(time.time()))
                rows = bench.rows
            else:
                rows = campaign(bench, asked.kills, asked.results or Path(place) / "results.jsonl", asked.seed)
        finally:
            bench.close()
    for other in asked.others:
        rows = summed(read_results(other), rows)
    print(table(rows), table(rows, 1), *losses(rows), sep="\n", flush=True)
    if asked.page:
        told = (
            f"{datetime.date.today()}, {platform.system()} on {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, seed {asked.seed}."
        )
        write_table(rows, asked.page, told)
    return 1 if losses(rows) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
