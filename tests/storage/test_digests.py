"""The sha256 of inputs, found in the background: whatever the threads, the same digests and the same first trouble.

Guards `storage.digests`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage import digests as module
from safemerge_recipes.storage.digests import Digests, InputDigest, threads_for
from safemerge_recipes.storage.identity import FileIdentity


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Six files of a few pieces each, and a cache that knows nothing."""
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "CHUNK", 1 << 12)
    paths = [tmp_path / str(number) for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom(10_000 * (6 - number) + 1))
    return paths


def _identities(paths: list[Path]) -> list[FileIdentity]:
    return [FileIdentity.of(path) for path in paths]


@pytest.mark.parametrize("threads", [1, 4, 9])
def test_every_file_has_its_digest_in_the_order_of_the_files(files: list[Path], threads: int) -> None:
    known = {str(files[2]): InputDigest("0" * 64, "earlier")}
    found = Digests(_identities(files), known, threads).result()
    assert list(found) == [str(path) for path in files]
    for path in files:
        expected = "0" * 64 if path == files[2] else hashlib.sha256(path.read_bytes()).hexdigest()
        assert found[str(path)].sha256 == expected


def test_several_files_are_read_at_a_time(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    met, real = threading.Barrier(3), module.file_digest

    def digest(identity: FileIdentity, stop: threading.Event | None = None) -> InputDigest | None:
        met.wait(10)
        return real(identity, stop)

    monkeypatch.setattr(module, "file_digest", digest)
    assert len(Digests(_identities(files), threads=3).result()) == 6


@pytest.mark.parametrize("threads", [1, 4])
def test_of_several_bad_files_the_first_is_named(files: list[Path], threads: int) -> None:
    identities = _identities(files)
    for path in (files[1], files[3], files[5]):
        path.write_bytes(b"another")
    with pytest.raises(SourceError, match=f"{files[1]}: changed"):
        Digests(identities, threads=threads).result()


def test_without_threads_the_caller_does_it(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert len(Digests(_identities(files), threads=4).result()) == 6


def test_what_is_stopped_reads_no_further(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def digest(identity: FileIdentity, stop: threading.Event) -> InputDigest | None:
        begun.set()
        assert stop.wait(10)
        return None

    monkeypatch.setattr(module, "file_digest", digest)
    found = Digests(_identities(files), threads=2)
    assert begun.wait(10)
    found.close()
    assert found.result() == {}


def test_threads_follow_workers_within_an_eighth_of_the_memory() -> None:
    assert [threads_for(workers, 2_000_000_000) for workers in (1, 2, 16, 64)] == [1, 2, 16, 29]
    assert threads_for(16, 256_000_000) == 3
    assert threads_for(2, 50_000_000) == 1
