"""Runs are killed, starved of disk and fed failing disks; the same command always ends in the same bytes.

Guards `engine.resume`, `engine.seal` and `engine.local_store`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from safemerge_recipes.engine.executors.threads import Threads
from safemerge_recipes.engine.folder import LOCK_FILE, MANIFEST_FILE, locked
from safemerge_recipes.engine.journal import JOURNAL_FILE
from safemerge_recipes.engine.seal import Sealer
from safemerge_recipes.storage import reader
from tests.fixtures.program import digests, finish, run, spawn, warm
from tests.fixtures.sharded_family import make_family, write_recipe
from tests.whole.faults import at_call


def half_slow(count):
    """Numbers of tries, of which every second is made every day."""
    return [pytest.param(number, marks=[pytest.mark.slow] if number % 2 else []) for number in range(count)]


def killed_at(call, counter=""):
    """Python that kills the program at its n-th call that changes the disk; 0: never."""
    return at_call("kill", call, counter).before


@pytest.fixture(scope="module")
def start():
    """Runs the program in a process of its own."""
    return warm()


@pytest.fixture(scope="module")
def family(tmp_path_factory, start):
    """A sharded family, the digests of an undisturbed run, and the number of calls that it makes."""
    root = tmp_path_factory.mktemp("family")
    recipe = make_family(root)
    (root / "cache").mkdir()
    code, _, err = start("run", recipe, "--output", root / "plain", before=killed_at(0, root / "calls"))
    assert code == 0, err
    calls = int((root / "calls").read_text())
    return recipe, digests(root / "plain"), calls


def loads(folder) -> bool:
    """Whether transformers takes the folder for a model."""
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def check_state(out, part):
    """An output is complete or not there; a working folder without its last weight has no config."""
    if out.exists():
        assert run("verify", out)[0] == 0
    if part.exists() and any(path.name.endswith(".safetensors.part") for path in part.iterdir()):
        assert not (part / "config.json").exists()
        assert not (part / MANIFEST_FILE).exists()


def kill_and_resume(start, family, tmp_path, at, *, again=None, first=()):
    recipe, expected, _ = family
    out, part = tmp_path / f"out{at}", tmp_path / f"out{at}.part"
    os.environ["SAFEMERGE_CACHE"] = str(tmp_path / f"cache{at}-{again}")  # cold, as when the calls were counted
    code, _, err = start("run", recipe, "--output", out, *first, before=killed_at(at))
    killed = code == -signal.SIGKILL
    assert killed or code == 0, err
    check_state(out, part)
    if again is not None:  # and once more while resuming
        start("run", recipe, "--output", out, *first, before=killed_at(again))
        check_state(out, part)
    if not (out / MANIFEST_FILE).exists():
        code, _, err = run("run", recipe, "--output", out, *first)
        assert code == 0, err
    assert digests(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((f"out{at}", f".out{at}"))) == [
        f"out{at}"
    ]
    assert not (out / JOURNAL_FILE).exists()
    shutil.rmtree(out)
    return killed


@pytest.mark.parametrize("number", half_slow(20))
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(start, family, tmp_path, number):
    dice = random.Random(number)
    at = 1 + (family[2] - 1) * number // 20 + dice.randrange(max(1, family[2] // 20))
    kill_and_resume(start, family, tmp_path, at, again=dice.randrange(1, family[2]) if number % 4 == 0 else None)


@pytest.mark.slow
def test_two_hundred_kill_points_and_as_many_double_kills(start, family, tmp_path):
    dice, killed = random.Random(2025), 0
    points = sorted(dice.sample(range(1, family[2] + 1), min(200, family[2])))
    points += [dice.randrange(1, family[2]) for _ in range(200 - len(points))]
    for at in points:
        killed += kill_and_resume(start, family, tmp_path, at)
    for at in dice.choices(range(1, family[2]), k=200):
        killed += kill_and_resume(start, family, tmp_path, at, again=dice.randrange(1, family[2]))
    assert killed > 350  # the number of calls differs a little from run to run; a few kills come too late


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_run_of_several_deltas_killed_anywhere_goes_on_to_the_same_bytes(start, family, tmp_path, method):
    recipe, _, calls = family
    many = [
        "--set", "sources.others={third: ./base}", "--set", f"merge.method={method}",
        "--set", "merge.weights={finetuned: 0.7, safety: 0.5, third: -0.3}",
    ]  # fmt: skip
    if method == "ties":
        many += ["--set", "merge.density=0.5"]
    plain = tmp_path / "plain"
    code, _, err = run("run", recipe, "--output", plain, *many)
    assert code == 0, err
    assert digests(plain) != family[1]
    several = recipe, digests(plain), calls
    killed = sum(
        kill_and_resume(start, several, tmp_path, 1 + calls * number // 12, again=calls // 2, first=many)
        for number in range(12)
    )
    assert killed > 8


@pytest.mark.parametrize("number", half_slow(6))
def test_replacing_an_output_is_safe_from_kills_too(start, family, tmp_path, number):
    recipe, expected, calls = family
    out, part = tmp_path / "out", tmp_path / "out.part"
    assert run("run", recipe, "--output", out, "--set", "gate.tau=0.3")[0] == 0
    assert digests(out) != expected
    at = 1 + calls * number // 6
    start("run", recipe, "--output", out, "--force", before=killed_at(at))
    assert out.exists() or part.exists()
    check_state(out, part)
    code, _, err = run("run", recipe, "--output", out, "--force")
    assert code == 0, err
    assert digests(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_unfinished_tensors_are_written_again(start, family, tmp_path):
    recipe, _, calls = family
    out = tmp_path / "out"
    start("run", recipe, "--output", out, "--workers", "1", before=killed_at(calls // 2))
    lines = (tmp_path / "out.part" / JOURNAL_FILE).read_bytes().count(b"\n") - 1
    code, printed, _ = run("run", recipe, "--output", out, "--json")
    assert code == 0
    assert lines - 1 <= json.loads(printed)["resumed"] <= lines
    assert lines > 1


def test_torn_and_lying_journals_cost_time_but_no_byte(start, family, tmp_path):
    recipe, expected, calls = family
    out, part = tmp_path / "out", tmp_path / "out.part"
    start("run", recipe, "--output", out, before=killed_at(calls * 2 // 3))
    journal = part / JOURNAL_FILE
    weights = next(path for path in part.iterdir() if ".safetensors" in path.name)
    with open(weights, "r+b") as file:  # as a power failure may leave it: the line is there, the bytes are not
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    journal.write_bytes(journal.read_bytes() + b'{"tensor": ["model"], "key"\x00 torn')
    assert run("run", recipe, "--output", out)[0] == 0
    assert digests(out) == expected


def test_transformers_refuses_an_unfinished_folder(start, family, tmp_path):
    recipe, _, calls = family
    for n, at in enumerate((calls // 3, calls // 2)):
        out = tmp_path / str(n) / "out"
        os.environ["SAFEMERGE_CACHE"] = str(tmp_path / f"cache{n}")
        start("run", recipe, "--output", out, before=killed_at(at))
        assert not loads(out.with_name("out.part"))
        assert not loads(out)
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert loads(tmp_path / "out")


# A run that can be interrupted in the middle: every write takes its time.
SLOW = """
import os, time
real = os.pwrite
def pwrite(*args):
    time.sleep(0.05)
    return real(*args)
os.pwrite = pwrite
"""


def wait_for(path, process):
    for _ in range(3000):
        if path.exists() and path.read_bytes().count(b"\n") > 4:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_schedulers_notice_end_politely_and_resume(family, tmp_path, which):
    recipe, expected, _ = family
    out = tmp_path / "out"
    process = spawn("run", recipe, "--output", out, before=SLOW)
    wait_for(tmp_path / "out.part" / JOURNAL_FILE, process)
    process.send_signal(which)
    code, printed, err = finish(process)
    assert code == 5
    assert printed == ""
    assert err.count("safemerge:") == 1
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert not out.exists()
    code, printed, _ = run("run", recipe, "--output", out, "--json")
    assert code == 0
    assert json.loads(printed)["resumed"] > 0
    assert digests(out) == expected


def test_a_second_run_on_an_output_is_refused_and_the_first_undisturbed(family, tmp_path):
    recipe, expected, _ = family
    out = tmp_path / "out"
    process = spawn("run", recipe, "--output", out, before=SLOW)
    wait_for(tmp_path / "out.part" / JOURNAL_FILE, process)
    code, _, err = run("run", recipe, "--output", out)
    assert code == 4
    assert f"process {process.pid} on" in err
    code, _, err = run("run", recipe, "--output", out, "--force")
    assert code == 4
    assert finish(process)[0] == 0
    assert digests(out) == expected


def test_many_runs_that_start_at_once_leave_one_sound_output(family, tmp_path):
    recipe, expected, _ = family
    out = tmp_path / "out"
    results = [finish(process) for process in [spawn("run", recipe, "--output", out) for _ in range(3)]]
    assert {code for code, _, _ in results} <= {0, 4}
    assert sum(code == 0 for code, _, _ in results) == 1
    assert all("Traceback" not in err and "a bug" not in err for _, _, err in results)
    assert digests(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_outlives_no_process(tmp_path):
    (tmp_path / LOCK_FILE).write_text("process 1 on elsewhere, long gone")
    with locked(tmp_path, "out.part"):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


# Inputs that change


def touch_up(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_input_that_changed_since_the_interruption_is_refused(start, family, tmp_path):
    root = tmp_path / "models"
    recipe = make_family(root)
    out, part = tmp_path / "out", tmp_path / "out.part"
    start("run", recipe, "--output", out, before=killed_at(family[2] // 2))
    changed = root / "safety" / "model-00002-of-00003.safetensors"
    touch_up(changed)
    before = digests(part, without=(LOCK_FILE,))
    code, _, err = run("run", recipe, "--output", out)
    assert code == 3
    assert str(changed) in err
    assert "--force" in err
    assert digests(part, without=(LOCK_FILE,)) == before
    assert run("run", recipe, "--output", out, "--force")[0] == 0
    assert run("run", recipe, "--output", tmp_path / "anew")[0] == 0
    assert digests(out) == digests(tmp_path / "anew")


@pytest.mark.parametrize("moment", ["before", "during"])
def test_an_input_that_changes_between_plan_and_write_is_refused(tmp_path, monkeypatch, moment):
    recipe = make_family(tmp_path / "models")
    changed = tmp_path / "models" / "aligned" / "model-00001-of-00003.safetensors"
    from safemerge_recipes.pipeline import writing

    module, name = (writing, "carry_out") if moment == "before" else (Threads, "run")
    real = getattr(module, name)

    def meddled(*args, **kwargs):
        touch_up(changed)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, meddled)
    code, _, err = run("run", recipe, "--output", tmp_path / "out")
    assert code == 3
    assert str(changed) in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


# Disks that fill up and fail


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"


def test_a_limit_on_file_sizes_is_a_full_disk(start, family, tmp_path):
    recipe, expected, _ = family
    code, _, err = start("run", recipe, "--output", tmp_path / "out", before=LIMIT)
    assert code in (4, 5)
    assert err.count("safemerge:") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


def failing(real, number, after):
    """A stand-in for a write of `os` that fails with `number` once it was called `after` times."""
    calls = [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["pwrite", "write", "fsync", "rename", "replace", "copy_file_range"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_fills_up_at_any_write_stops_the_run_and_no_more(family, tmp_path, monkeypatch, name, after):
    recipe, expected, _ = family
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), errno.ENOSPC, after))
        code, _, err = run("run", recipe, "--output", tmp_path / "out")
    assert code in (0, 4, 5)  # 0 where it was not called that often
    if code:
        assert "No space left" in err
        assert err.count("safemerge:") == 1
        assert not (tmp_path / "out").exists()
        assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_small_file_system_that_fills_up(start, family, tmp_path):
    recipe, expected, _ = family
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, _, err = start("run", recipe, "--output", place / "out")
        assert code == 4
        assert "are needed" in err
        assert list(place.iterdir()) == []
        # Room for the weights, none for the small files after them.
        subprocess.run(["mount", "-o", "remount,size=64k", place], check=True)
        code, _, err = start("run", recipe, "--output", place / "out")
        assert (code, "No space left" in err) == (5, True), err
        subprocess.run(["mount", "-o", "remount,size=4m", place], check=True)
        assert start("run", recipe, "--output", place / "out")[0] == 0
        assert digests(place / "out") == expected
    finally:
        subprocess.run(["umount", place], check=True)


def test_short_reads_are_continued(family, tmp_path, monkeypatch):
    recipe, expected, _ = family
    real = os.preadv

    def short(file, buffers, offset):
        return real(file, [memoryview(buffers[0])[: max(1, min(len(buffers[0]), 777))]], offset)

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(os, "copy_file_range", lambda s, t, n, a, b: _short_copy(s, t, min(n, 501), a, b))
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


_REAL_COPY = os.copy_file_range


def _short_copy(source, target, count, at, to):
    return _REAL_COPY(source, target, count, at, to)


def test_short_writes_are_continued(family, tmp_path, monkeypatch):
    recipe, expected, _ = family
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, memoryview(data)[:777], at))
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("after", [0, 5, 9])
def test_a_read_error_while_writing_keeps_what_is_done(family, tmp_path, monkeypatch, after):
    recipe, expected, _ = family
    real, execute = reader.Reader.read_bytes, Threads.run
    calls = [0]

    def read(self, path, offset, view):
        calls[0] += 1
        if calls[0] > after:
            raise reader.ReadError(f"{path}: byte {offset}: {os.strerror(errno.EIO)}; is the disk failing?")
        real(self, path, offset, view)

    def meddled(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(reader.Reader, "read_bytes", read)
            return execute(*args, **kwargs)

    with monkeypatch.context() as outer:
        outer.setattr(Threads, "run", meddled)
        code, _, err = run("run", recipe, "--output", tmp_path / "out", "--workers", "1")
    assert code == 5
    assert "Input/output error" in err
    assert "goes on" in err
    code, printed, _ = run("run", recipe, "--output", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(printed)["resumed"] >= after // 3
    assert digests(tmp_path / "out") == expected


def test_a_read_error_of_the_disk_itself_is_told_with_file_and_byte(family, tmp_path, monkeypatch):
    real = os.preadv

    def broken(file, buffers, offset):
        if offset > 3000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    code, _, err = run("run", family[0], "--output", tmp_path / "out")
    assert code == 3  # measuring comes first: nothing was written yet
    assert "Input/output error" in err
    assert "byte" in err
    assert not (tmp_path / "out.part").exists()


def test_bytes_that_change_under_the_writer_are_noticed(family, tmp_path, monkeypatch):
    recipe, expected, _ = family
    real = Sealer.finished
    struck = []

    def finished(self, name, digest):
        if digest is not None and not struck:
            struck.append(name)
            slot = self.store.layout.slots[name]
            self.store.write(slot.shard, slot.offset, memoryview(b"\x01\x02"))
        real(self, name, digest)

    with monkeypatch.context() as patch:
        patch.setattr(Sealer, "finished", finished)
        code, _, err = run("run", recipe, "--output", tmp_path / "out")
    assert code == 5
    assert struck[0] in err
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


# Replacing


def test_replacing_reuses_what_stays_the_same_and_refuses_its_own_sources(tmp_path):
    recipe = make_family(tmp_path)
    out = tmp_path / "out"
    assert run("run", recipe)[0] == 0
    assert run("run", recipe)[0] == 4
    code, printed, _ = run("run", recipe, "--force", "--set", "merge.alpha=0.5", "--json")
    assert code == 0
    assert 0 < json.loads(printed)["resumed"] < 24
    assert run("run", recipe, "--output", tmp_path / "fresh", "--set", "merge.alpha=0.5")[0] == 0
    assert digests(out) == digests(tmp_path / "fresh")
    write_recipe(tmp_path, sources={"base": "base", "aligned": "aligned", "finetuned": "out", "safety": "safety"})
    before = digests(out, without=())
    code, _, err = run("run", recipe, "--force")
    assert code == 4
    assert "sources.finetuned" in err
    assert digests(out, without=()) == before


def test_a_reused_output_that_was_damaged_is_mended(tmp_path):
    recipe = make_family(tmp_path)
    assert run("run", recipe)[0] == 0
    expected = digests(tmp_path / "out")
    touch_up(tmp_path / "out" / "model-00001-of-00003.safetensors")
    code, _, err = run("run", recipe, "--force")
    assert code == 5
    assert "not those written" in err
    assert run("run", recipe)[0] == 0
    assert digests(tmp_path / "out") == expected


def test_strangers_in_the_way_are_left_alone(tmp_path):
    recipe = make_family(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    (tmp_path / "out.old").mkdir()
    for options in ((), ("--force",)):
        assert run("run", recipe, *options)[0] == 4
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert run("run", recipe, "--output", tmp_path / "deep" / "er" / "out", "--set", "gate.tau=-9")[0] in (0, 2)
    (tmp_path / "link").symlink_to(tmp_path / "aligned")
    assert run("run", recipe, "--output", tmp_path / "link")[0] == 4
    assert run("run", recipe, "--output", tmp_path / "aligned" / "inner", "--force")[0] == 4
    assert (tmp_path / "out.old").exists()
