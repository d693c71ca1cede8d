"""Running one child process and measuring all of it: wall time, CPU time, memory. Knows no merging."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

KEPT = ("VmRSS", "VmHWM", "RssAnon", "RssShmem")
INTERVAL = 0.02  # seconds between two looks at memory


@dataclass(frozen=True, slots=True)
class Usage:
    """What a child and its descendants used: seconds and bytes.

    `peak_rss` counts every resident page, mapped files included; `peak_own` only anonymous and shared memory,
    which the kernel cannot drop. Both are sums over the process tree, sampled; `peak_rss` is at least the
    high-water mark of the largest process, which no sampling misses. `max_rss` is what the kernel reports at
    exit; on Linux it is never below the size of the process that started the child.
    """

    code: int
    wall: float
    cpu: float
    peak_rss: int
    peak_own: int
    max_rss: int
    samples: int


def measure(command: list[str], log: Path, env: dict[str, str], cwd: Path, timeout: float = 3600.0) -> Usage:
    """Run a command to its end, standard output to `log` and errors to `log` + ".err", and return its usage.

    A child that outlives `timeout` seconds is killed; its code is then negative.
    """
    with log.open("wb") as out, log.with_name(log.name + ".err").open("wb") as err:
        began = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        watch = _Watch(child.pid, began + timeout)
        watch.start()
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            watch.kill()
            raise
        finally:
            wall = time.perf_counter() - began
            watch.done.set()
            watch.join()
        child.returncode = os.waitstatus_to_exitcode(status)
    return Usage(
        child.returncode, wall, used.ru_utime + used.ru_stime, watch.peak_rss, watch.peak_own,
        used.ru_maxrss * 1024, watch.samples,
    )  # fmt: skip


class _Watch(threading.Thread):
    def __init__(self, pid: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.deadline = pid, deadline
        self.done = threading.Event()
        self.peak_rss = self.peak_own = self.samples = 0

    def run(self) -> None:
        while True:
            if time.perf_counter() > self.deadline:
                self.kill()
            rss = own = high = 0
            for pid in _tree(self.pid):
                memory = _memory(pid)
                rss += memory.get("VmRSS", 0)
                high = max(high, memory.get("VmHWM", 0))
                own += memory.get("RssAnon", 0) + memory.get("RssShmem", 0)
            self.peak_rss, self.peak_own = max(self.peak_rss, rss, high), max(self.peak_own, own)
            self.samples += 1
            if self.done.wait(INTERVAL):
                return

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # the child leads its own group


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        except OSError:
            continue  # ended meanwhile
    return found


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(KEPT))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in fields}
