"""Places that are ordinary somewhere: it works, or one message says what is missing before anything is computed.

Guards `cli.program`, `cli.streams`, `engine.folder`, `storage.descriptors` and what does without threads.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from safemerge_recipes.storage import files
from safemerge_recipes.storage.descriptors import Descriptors
from tests.fixtures.program import digests, run, snapshot
from tests.fixtures.sharded_family import make_family

MAIN = [sys.executable, "-m", "safemerge_recipes"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def expected(recipe: Path) -> dict[str, str]:
    assert run("run", recipe, "--output", recipe.parent / "expected")[0] == 0
    return digests(recipe.parent / "expected")


def shell(text: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A shell command in a folder and environment of its own; `"$@"` is the program with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = ["bash", "-c", text, "bash", *MAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


def one_message(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert words in done.stderr


def test_all_streams_may_be_closed(recipe: Path, expected: dict[str, str], tmp_path: Path) -> None:
    assert shell('exec "$@" <&- >&- 2>&-', "run", recipe, "--output", tmp_path / "out").returncode == 0
    assert digests(tmp_path / "out") == expected
    one_message(shell('exec "$@" <&-', "run", "-"), 2, "standard input")


def test_a_current_folder_that_was_deleted(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f'cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "$@"', "run", recipe, "--output", tmp_path / "out")
    one_message(done, 4, "current folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody without an entry")
def test_nobody_without_a_home_or_a_name(recipe: Path, expected: dict[str, str]) -> None:
    # Not under pytest's own folder, which another session of pytest closes to others.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        shutil.copytree(recipe.parent, Path(place) / "family", symlinks=True)
        work = Path(place) / "work"
        work.mkdir()
        os.chown(work, 12345, 12345)
        for one in (Path(place) / "family", *(Path(place) / "family").rglob("*")):
            one.chmod(0o755 if one.is_dir() else 0o644)
        _run_as_nobody(Path(place) / "family" / recipe.name, expected, work)


def _run_as_nobody(recipe: Path, expected: dict[str, str], work: Path) -> None:
    unset = "unset HOME SAFEMERGE_CACHE XDG_CACHE_HOME; exec setpriv --reuid 12345 --regid 12345 --clear-groups"
    done = shell(f'{unset} "$@"', "run", recipe, "--output", work / "out", cwd=work)
    if "ModuleNotFoundError" in done.stderr or "can't open" in done.stderr:
        pytest.skip("another user cannot read the program here")
    assert done.returncode == 0, done.stderr
    assert digests(work / "out").items() - expected.items() <= {("README.md", digests(work / "out")["README.md"])}
    assert [path.name for path in work.iterdir()] == ["out"]


def test_the_program_may_be_called_from_a_script(recipe: Path) -> None:
    script = "import sys; from safemerge_recipes.cli import main; assert 'typer' not in sys.modules; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, "validate", str(recipe)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null"])
def test_a_cache_that_cannot_be_written(
    recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("SAFEMERGE_CACHE", place)
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


def test_many_shards_with_few_descriptors(tmp_path: Path) -> None:
    recipe = make_family(tmp_path, shards=22)
    done = shell('ulimit -n 40; exec "$@"', "run", recipe, "--output", tmp_path / "few", "--workers", 6)
    assert done.returncode == 0, done.stderr
    assert run("run", recipe, "--output", tmp_path / "many")[0] == 0
    assert digests(tmp_path / "few") == digests(tmp_path / "many")


def test_the_soft_limit_of_files_is_raised() -> None:
    code = (
        "import resource; from safemerge_recipes.cli.app import main; import atexit; "
        "atexit.register(lambda: print(*resource.getrlimit(resource.RLIMIT_NOFILE))); main()"
    )
    done = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 50; exec "$@"', "bash", sys.executable, "-c", code, "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    soft, hard = done.stdout.splitlines()[-1].split()
    assert soft == hard


def test_a_pool_closes_what_nobody_uses_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (16, 16))  # room for two
    for number in range(5):
        (tmp_path / str(number)).write_text(str(number))
    opened: list[int] = []

    def opening(number: int) -> int:
        opened.append(number)
        return os.open(tmp_path / str(number), os.O_RDONLY)

    pool = Descriptors(opening)
    with pool.use(0) as zero, pool.use(1) as one, pool.use(2) as two:
        assert [os.pread(file, 9, 0) for file in (zero, one, two)] == [b"0", b"1", b"2"]
    for number in (3, 4, 3, 4):
        with pool.use(number) as file:
            assert os.pread(file, 9, 0) == str(number).encode()
    assert opened == [0, 1, 2, 3, 4]
    pool.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


@pytest.mark.parametrize("allowed", [1, 2, 3, 4])
def test_fewer_threads_give_the_same_bytes(
    recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    real, started = threading.Thread.start, [0]

    def start(self: threading.Thread) -> None:
        started[0] += 1
        if started[0] % 5 >= allowed:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    code, _, err = run("run", recipe, "--output", tmp_path / "out", "--workers", 1)
    monkeypatch.undo()
    if code:
        assert (code, err.count("\n")) == (4, 1), err
        assert "no more threads" in err
        assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


def test_a_name_that_leaves_no_room_for_working_names(recipe: Path, tmp_path: Path) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    for name in ("x" * most, "x" * (most - 4), "é" * (most // 2), "x" * (most - 19)):
        before = snapshot(tmp_path)
        code, _, err = run("run", recipe, "--output", tmp_path / name)
        assert (code, err.count("\n")) == (4, 1)
        assert f"expected at most {most - 20} here" in err
        assert snapshot(tmp_path) == before
    longest = tmp_path / ("x" * (most - 20))
    assert run("run", recipe, "--output", longest)[0] == 0
    assert run("run", recipe, "--output", longest, "--force", "--set", "output.max_shard_size=20KB")[0] == 0
    assert run("verify", longest)[0] == 0


def test_standard_input_is_read_once(recipe: Path, tmp_path: Path) -> None:
    command = ("sweep", "-", "--tau", "0.1,0.2", "--output", tmp_path / "sweep")
    one_message(shell(f'exec "$@" < {recipe}', *command), 2, "standard input: evaluate: missing")
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def mounted(tmp_path: Path) -> Any:
    """Mounts a file system; what is mounted is unmounted afterwards."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    places: list[Path] = []

    def mount(place: Path, kind: str, *options: str) -> None:
        place.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", kind, *options, kind, place], capture_output=True, check=False).returncode:
            pytest.skip(f"mounting {kind} is not allowed here")
        places.append(place)

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", place], check=True)


def test_an_output_on_another_file_system(recipe: Path, expected: dict[str, str], tmp_path: Path, mounted: Any) -> None:
    mounted(tmp_path / "disk", "tmpfs")
    code, _, err = run("run", recipe, "--output", tmp_path / "disk")
    assert (code, err.count("\n")) == (4, 1)
    assert "root of a file system" in err
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert run("run", recipe, "--output", tmp_path / "disk" / "out")[0] == 0
    assert digests(tmp_path / "disk" / "out") == expected


@pytest.mark.parametrize("change", [(), ("--set", "output.max_shard_size=20KB")])
def test_an_output_in_the_lower_layer_of_an_overlay(
    recipe: Path, tmp_path: Path, mounted: Any, change: tuple[str, ...]
) -> None:
    mounted(tmp_path / "disk", "tmpfs")
    lower, upper, work, merged = (tmp_path / "disk" / name for name in ("lower", "upper", "work", "merged"))
    for folder in (upper, work):
        folder.mkdir()
    assert run("run", recipe, "--output", lower / "out")[0] == 0
    mounted(merged, "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}")
    before = digests(merged / "out", without=())
    code, _, err = run("run", recipe, "--output", merged / "out", "--force", *change)
    if code:  # where the overlay cannot rename
        assert (code, err.count("\n")) == (4, 1)
        assert "overlay" in err
        assert digests(merged / "out", without=()) == before
        assert [path.name for path in merged.iterdir()] == ["out"]
    assert run("run", recipe, "--output", merged / "new")[0] == 0
    assert run("verify", merged / "new")[0] == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


def test_a_file_system_that_flushes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    files.sync_folder(tmp_path)


def test_a_kernel_that_copies_nothing(
    recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("module", ["cli.app", "cli.program", "__main__"])
def test_windows_is_refused_in_one_sentence(module: str) -> None:
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; sys.platform = 'win32'; "
        f"import safemerge_recipes.{module}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "WSL" in done.stderr
    assert "fcntl" not in done.stderr
