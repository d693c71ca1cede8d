"""Faults over every verb, as many as there is time for, and the table of docs/reliability.md.

python -m tests.whole.reliability --kills 500 docs/reliability.md   # `make reliability`
python -m tests.whole.reliability --minutes 30                      # `make soak`: ends at the first loss
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.whole import faults
from tests.whole.faults import Bench, Verb, at_call

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
ERRORS = ("EIO", "ENOSPC")


def kill(bench: Bench, verb: Verb, dice: random.Random, times: int = 1) -> str:
    """Kills a verb at a call, then again while the same command goes on, `times` in all."""
    calls = bench.expected(verb)[2]
    return bench.attempt(verb, *(at_call("kill", dice.randrange(1, calls + 1)) for _ in range(times)))


def fail(bench: Bench, verb: Verb, dice: random.Random, how: str) -> str:
    """Lets one call of a verb fail with an error."""
    return bench.attempt(verb, at_call(how, dice.randrange(1, bench.expected(verb)[2] + 1)))


def writing(bench: Bench) -> list[Verb]:
    """The verbs that change the disk; those that run models come once where the others come four times."""
    active = [verb for verb in bench.verbs if bench.expected(verb)[2]]
    return [verb for verb in active for _ in range(1 if verb.scores else 4)]


def plant(bench: Bench, dice: random.Random) -> None:
    """Puts a pipe, a device, a link or a folder where each file of an output was."""
    for path in sorted((bench.root / "made" / "scored").iterdir()):
        bench.plant(dice.choice(list(faults.PLANTED)), path.name)


def campaign(bench: Bench, kills: int, dice: random.Random) -> None:
    """So many kills over all verbs, three in a row; between them errors, and what lasts for a whole run."""
    todo = writing(bench)
    cheap = [verb for verb in bench.verbs if not verb.scores]
    lasting = [(verb, fault) for verb in cheap for fault in faults.LASTING]
    dice.shuffle(lasting)
    for number in range(-(-kills // 3)):
        kill(bench, todo[number % len(todo)], dice, 3)
        if number % 4 == 0:
            for how in ERRORS:
                verb = dice.choice([verb for verb in cheap if bench.expected(verb)[2]])
                fail(bench, verb, dice, how)
        if lasting and number % 2 == 0:
            bench.attempt(*lasting.pop())
    for verb, fault in lasting:
        bench.attempt(verb, fault)


def soak(bench: Bench, minutes: float, dice: random.Random) -> None:
    """Goes on with faults until the time is over, or something is lost."""
    until, todo = time.monotonic() + 60 * minutes, writing(bench)
    while time.monotonic() < until and not losses(bench):
        verb = dice.choice(todo)
        how = dice.choice(("kill", "kill", "kill", *ERRORS))
        if how == "kill":
            kill(bench, verb, dice, dice.randint(1, 3))
        elif not verb.scores:
            fail(bench, verb, dice, how)


def losses(bench: Bench) -> list[str]:
    """Everything that was lost, in words."""
    return [one for row in bench.rows.values() for one in row.lost]


def write_table(bench: Bench, page: Path, seconds: float) -> None:
    """Puts the table into a page, between its marks."""
    text = page.read_text()
    verbs = ", ".join(verb.name for verb in bench.verbs)
    told = (
        f"{datetime.date.today()}, {platform.system()} on {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {seconds / 60:.0f} minutes; verbs: {verbs}."
    )
    page.write_text(f"{text[: text.index(BEGIN)]}{BEGIN}\n{told}\n\n{bench.table()}\n{text[text.index(END) :]}")


def main() -> int:
    """The program; ends with 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="page whose table is written anew")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--minutes", type=float, help="go on for so long instead")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    dice, begun = random.Random(asked.seed), time.monotonic()
    print(f"seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        try:
            if asked.minutes:
                soak(bench, asked.minutes, dice)
            else:
                campaign(bench, asked.kills, dice)
        finally:
            print(bench.table(), *losses(bench), sep="\n", flush=True)
            bench.close()
        if asked.page:
            write_table(bench, asked.page, time.monotonic() - begun)
    return 1 if losses(bench) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
