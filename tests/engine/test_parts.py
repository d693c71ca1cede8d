"""A run by workers that share nothing but files: the same bytes, whoever dies, comes twice or comes late.

Guards `api.parts`, `engine.executors.parts`, `engine.batches`, `engine.leases`, `engine.receipts`, `engine.part_store`,
`engine.shared_output` and `storage.place`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safemerge_recipes.engine import leases
from safemerge_recipes.engine.leases import Leases
from safemerge_recipes.storage.place import FolderPlace
from tests.fixtures.program import digests, run, spawn
from tests.fixtures.sharded_family import make_family, write_recipe

IMPATIENT = """
from safemerge_recipes.engine import leases
from safemerge_recipes.engine.executors import parts
leases.BEAT, leases.SILENCE, parts.LOOK = 0.1, 1.0, 0.1
"""
"""What makes a worker notice within a second that another has gone."""
SLOWLY = (
    IMPATIENT
    + """
import time
from safemerge_recipes.storage.reader import Reader
read = Reader.read_bytes
def slowly(self, *what):
    time.sleep(0.02)
    return read(self, *what)
Reader.read_bytes = slowly
"""
)
"""A worker that is still at it when the test strikes."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    from safemerge_recipes.engine.executors import parts

    monkeypatch.setattr(leases, "BEAT", 0.1)
    monkeypatch.setattr(leases, "SILENCE", 1.0)
    monkeypatch.setattr(parts, "LOOK", 0.05)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family that merges into some ten files, and what a plain run makes of it in `expected`."""
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    make_family(tmp_path)
    path: Path = write_recipe(
        tmp_path, merge={"method": "ties", "density": 0.5}, output={"path": "out", "max_shard_size": "8KB"}
    )
    assert run("run", path, "--output", tmp_path / "expected", "--no-evaluate")[0] == 0
    assert len(list((tmp_path / "expected").glob("*.safetensors"))) >= 5
    return path


def _finalized(recipe: Path) -> None:
    code, _, err = run("finalize", recipe)
    assert code == 0, err
    out = recipe.parent / "out"
    assert digests(out) == digests(recipe.parent / "expected")
    assert not Path(f"{out}.part").exists()
    assert run("verify", out)[0] == 0


def test_shares_in_any_order_make_the_output_of_one_run(recipe: Path) -> None:
    for part in ("3/3", "1/3"):
        code, printed, err = run("run", recipe, "--part", part, "--json")
        assert code == 0, err
    done = json.loads(printed)
    assert 0 < done["written"] < done["files"]
    code, _, err = run("finalize", recipe)
    assert code == 4
    assert "not written yet" in err
    assert run("run", recipe, "--part", "2/3")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path(f"{recipe.parent}/out.part").glob("*.safetensors")}
    code, printed, _ = run("run", recipe, "--part", "2/3")  # once more, with nothing left to do
    assert code == 0
    assert "`safemerge finalize` ends it" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    _finalized(recipe)
    code, _, err = run("run", recipe, "--part", "1/3")
    assert code == 4
    assert "holds a finished output" in err


def test_parts_are_named_soundly(recipe: Path) -> None:
    for part in ("0/3", "4/3", "1", "a/b", "-1/2"):
        code, _, err = run("run", recipe, f"--part={part}")
        assert code == 2
        assert "expected i/N" in err
    code, _, err = run("run", recipe, "--part", "1/2", "--force")
    assert code == 2
    assert "--force: expected without --part" in err
    assert not Path(f"{recipe.parent}/out.part").exists()


def test_workers_of_another_recipe_are_refused(recipe: Path) -> None:
    assert run("run", recipe, "--part", "1/2")[0] == 0
    code, _, err = run("run", recipe, "--part", "2/2", "--set", "gate.tau=0.5")
    assert code == 4
    assert "another recipe, other sources or another version" in err


def test_a_plain_run_takes_an_abandoned_output_over_and_believes_no_receipt(recipe: Path) -> None:
    assert run("run", recipe, "--part", "1/2", "--set", "merge.density=0.3")[0] == 0
    assert run("run", recipe)[0] == 0
    assert digests(recipe.parent / "out") == digests(recipe.parent / "expected")


def test_a_file_that_nobody_vouches_for_is_written_again(recipe: Path) -> None:
    assert run("run", recipe, "--part", "1/1")[0] == 0
    part = Path(f"{recipe.parent}/out.part")
    victim, shorter = sorted(part.glob("*.safetensors"))[:2]
    victim.write_bytes(victim.read_bytes()[:-2] + b"\0\0")
    (part / "safemerge_parts" / "receipts" / f"{victim.name}.json").unlink()
    os.truncate(shorter, shorter.stat().st_size - 1)
    assert run("finalize", recipe)[0] == 4
    assert run("run", recipe, "--part", "1/1")[0] == 0
    _finalized(recipe)


def _started(recipe: Path, part: str, before: str = IMPATIENT, home: str = "cache") -> subprocess.Popen[str]:
    cache = {"SAFEMERGE_CACHE": str(recipe.parent / home)}
    return spawn("run", recipe, "--part", part, "--workers", "1", before=before, env=cache)


def _wait_for(recipe: Path, pattern: str, child: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not list(Path(f"{recipe.parent}/out.part").glob(pattern)):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("moment", ["safemerge_parts/leases/moments/*", "safemerge_parts/receipts/*"])
def test_a_worker_that_is_killed_is_followed_by_another(recipe: Path, moment: str) -> None:
    first = _started(recipe, "1/2", SLOWLY)
    _wait_for(recipe, moment, first)
    first.kill()
    first.communicate()
    second = _started(recipe, "2/2")  # needs what the dead one was measuring
    assert second.wait(120) == 0, second.communicate()
    assert run("finalize", recipe)[0] == 4
    again = _started(recipe, "1/2")
    assert again.wait(120) == 0, again.communicate()
    _finalized(recipe)


def test_two_workers_with_one_part_and_a_third_that_was_stopped_for_a_while(recipe: Path) -> None:
    """The stopped one has lost its lease when it goes on, and writes over nobody."""
    sleeper = _started(recipe, "1/1", SLOWLY)
    _wait_for(recipe, "safemerge_parts/receipts/*", sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    twins = [_started(recipe, "1/1") for _ in range(2)]
    for twin in twins:
        assert twin.wait(120) == 0, twin.communicate()
    code, _, err = run("finalize", recipe)
    assert code == 4  # where locks work, nobody finishes what is still being written
    assert "another run is writing it" in err
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(120) == 0, sleeper.communicate()
    _finalized(recipe)


def test_a_worker_that_is_told_to_stop_says_how_to_go_on(recipe: Path) -> None:
    child = _started(recipe, "1/1", SLOWLY)
    _wait_for(recipe, "safemerge_parts/receipts/*", child)
    child.terminate()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 5
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert not list(Path(f"{recipe.parent}/out.part").rglob("*.part"))
    assert not list(Path(f"{recipe.parent}/out.part").rglob("*.tmp"))
    assert run("run", recipe, "--part", "1/1")[0] == 0
    _finalized(recipe)


def test_a_lease_is_lost_by_silence_and_not_by_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FolderPlace(tmp_path)
    holder, other = Leases(place), Leases(place)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that jumped back by half a century
    with holder.held("unit"):
        for _ in range(15):
            assert not other.is_free("unit")
            time.sleep(0.1)
    assert other.is_free("unit")
    place.write("leases/unit", b"of one that was killed")
    assert not other.is_free("unit")
    time.sleep(1.1)
    assert other.is_free("unit")


def test_a_process_of_this_machine_that_has_ended_holds_no_lease(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path)
    text = (
        "import os, sys; from pathlib import Path; from safemerge_recipes.engine.leases import Leases\n"
        "from safemerge_recipes.storage.place import FolderPlace\n"
        "with Leases(FolderPlace(Path(sys.argv[1]))).held('unit'): print(os.getpid(), flush=True); sys.stdin.read(1)\n"
        "os._exit(0)"
    )
    command = [sys.executable, "-c", text, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        other = Leases(place)
        assert not other.is_free("unit")
        word = place.read("leases/unit")
        assert word is not None
        child.kill()
        child.wait()
    assert other.is_free("unit")
    elsewhere = word.replace(socket.gethostname().encode(), b"another-machine")
    place.write("leases/unit", elsewhere)
    assert not other.is_free("unit")


def test_of_two_offers_the_first_wins(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path)
    assert place.offer("a/b", b"first") == b"first"
    assert place.offer("a/b", b"second") == b"first"
    assert place.names("a") == ["b"]
    place.remove("a/b")
    assert place.read("a/b") is None


def _open_files() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return found


def test_nothing_is_renamed_over_an_open_file_and_no_lock_is_needed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS without a lock daemon, where links between folders and syncing of folders may fail as well."""

    def checked(name: str) -> None:
        real = getattr(os, name)

        def rename(source: str, target: str, **where: int) -> None:
            folder = os.readlink(f"/proc/self/fd/{where['dst_dir_fd']}") if "dst_dir_fd" in where else os.getcwd()
            assert os.path.join(folder, target) not in _open_files(), target
            real(source, target, **where)

        monkeypatch.setattr(os, name, rename)

    def refused(*asked: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    for name in ("rename", "replace"):
        checked(name)
    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(os, "link", refused)
    for part in ("1/2", "2/2"):
        assert run("run", recipe, "--part", part)[0] == 0
    _finalized(recipe)
