"""Fuzzes targets, by coverage with atheris where it is installed, else by mutation.

    python -m fuzz.run --cases 100000                 # every target, one process each
    python -m fuzz.run header recipe --cases 1000000

Each case may take five seconds and the process 512 MB; more is a finding, as is any error but the expected ones.
The offending input is kept as `fuzz/found/<target>-<sha1>`.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

if "--here" in sys.argv and "coverage" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["safemerge_recipes", "yaml"]):
        import fuzz.targets  # noqa: F401
from fuzz.targets import DICTIONARY, TARGETS, seeds

HERE = Path(__file__).parent
SECONDS = 5
MEGABYTES = 512


def mutated(dice: random.Random, pool: list[bytes], words: tuple[bytes, ...]) -> bytes:
    """A case: a seed changed in a few places, spliced with another or with words of the format."""
    data = bytearray(dice.choice(pool))
    for _ in range(dice.choice((0, 1, 1, 2, 3, 5, 8, 20))):
        at = dice.randrange(len(data) + 1)
        what = dice.randrange(8)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << dice.randrange(8)
        elif what == 1:
            data[at:at] = bytes([dice.randrange(256)])
        elif what == 2:
            del data[at : at + dice.choice((1, 1, 2, 8, 64))]
        elif what == 3:
            data[at:at] = dice.choice(words)
        elif what == 4:
            other = dice.choice(pool)
            data[at:] = other[dice.randrange(len(other) + 1) :]
        elif what == 5:
            end = at + dice.randrange(1, 30)
            data[at:at] = bytes(data[at:end]) * dice.choice((1, 2, 50))
        elif what == 6:
            data[at : at + 1] = dice.choice(
                (b"-1", b"0", b"9" * 25, b"1e400", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\n", b"\\")
            )
        else:
            data[at : at + 8] = dice.choice((2**64 - 1, 2**63, 2**31, 0, 8, 255)).to_bytes(8, "little")
    return bytes(data[:200_000])


def keep(name: str, data: bytes) -> None:
    """Stores an offending input."""
    (HERE / "found").mkdir(exist_ok=True)
    (HERE / "found" / f"{name}-{hashlib.sha1(data, usedforsecurity=False).hexdigest()}").write_bytes(data)


class Watch:
    """Runs cases one by one: counts them, stops the clock on each, keeps what fails."""

    def __init__(self, name: str) -> None:
        self.name, self.target = name, TARGETS[name]
        self.cases, self.slowest = 0, 0.0
        self.data = b""
        signal.signal(signal.SIGPROF, self._late)

    def _late(self, number: int, frame: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    def __call__(self, data: bytes) -> None:
        """One case."""
        self.cases += 1
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work: waiting for a core is no hang
        try:
            self.target(data)
        except BaseException:
            keep(self.name, data)
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.slowest = max(self.slowest, time.process_time() - begun)

    def report(self, begun: float, how: str) -> dict[str, object]:
        """What was done."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if peak > MEGABYTES:
            raise MemoryError(f"{self.name}: {peak:.0f} MB")
        return {
            "target": self.name, "how": how, "cases": self.cases, "seconds": round(time.perf_counter() - begun, 1),
            "slowest_case_ms": round(1000 * self.slowest, 1), "peak_mb": round(peak),
        }  # fmt: skip


def by_mutation(name: str, cases: int, seed: int) -> dict[str, object]:
    """Fuzzes one target with mutated seeds."""
    dice, pool, watch, begun = random.Random(f"{name}{seed}"), list(seeds(name)), Watch(name), time.perf_counter()
    for data in pool:
        watch(data)
    for _ in range(cases):
        watch(mutated(dice, pool, DICTIONARY[name]))
    return watch.report(begun, "mutation")


def by_coverage(name: str, cases: int, seed: int) -> None:
    """Fuzzes one target with atheris; prints the report when the process ends."""
    import atheris

    corpus = HERE / "grown" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds(name):
        (corpus / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    words = corpus.with_suffix(".dict")
    words.write_text(
        "".join('"' + "".join(f"\\x{b:02x}" for b in word) + '"\n' for word in DICTIONARY[name] if len(word) < 60)
    )
    watch, begun = Watch(name), time.perf_counter()

    def case(data: bytes) -> None:
        watch(data)
        if watch.cases % 10_000 == 0:
            print(f"{name}: {watch.cases} cases, {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        if watch.cases == cases:
            print(json.dumps(watch.report(begun, "coverage")), flush=True)
            os._exit(0)

    options = [f"-seed={seed + 1}", "-max_len=4096", "-rss_limit_mb=512", f"-dict={words}", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], case)
    atheris.Fuzz()


def main() -> None:
    """Runs each target in a process of its own and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="default: all")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--how", choices=("coverage", "mutation"), default="mutation")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        faulthandler.enable()
        (name,) = arguments.targets
        if arguments.how == "coverage":
            by_coverage(name, arguments.cases, arguments.seed)
        else:
            print(json.dumps(by_mutation(name, arguments.cases, arguments.seed)))
        return
    failed = False
    for name in arguments.targets or TARGETS:
        command = [sys.executable, "-m", "fuzz.run", name, "--here", "--how", arguments.how]
        command += ["--cases", str(arguments.cases), "--seed", str(arguments.seed)]
        failed |= subprocess.run(command, cwd=HERE.parent).returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
