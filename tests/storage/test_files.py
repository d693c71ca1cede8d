"""There is one way to open a file by its name, and it neither hangs, nor follows, nor fills the memory.

Guards `storage.files`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safemerge_recipes.errors import SourceError
from safemerge_recipes.storage.files import (
    check_file,
    content_of,
    copy_file,
    inside,
    open_file,
    own_file,
    reading,
    within,
    write_file,
    written,
)
from safemerge_recipes.storage.safetensors import read_header

PACKAGE = Path(__file__).parents[2] / "safemerge_recipes"
OPENING = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "touch", "mknod"}
"""Calls by these names open something by its path, whatever they are called on ..."""
LOADING = {
    "copyfile",
    "copy2",
    "copytree",
    "safe_open",
    "load_file",
    "save_file",
    "memmap",
    "fromfile",
    "tofile",
    "genfromtxt",
    "loadtxt",
}
"""... and so do these."""
OTHERWISE = {
    ("storage/files.py", "os.open"): "is the one way",
    ("evaluation/judge.py", "_OPENER.open"): "asks a server, not a disk",
    ("engine/executors/ray.py", "store.open"): "opens the output's own files, through the store",
    ("engine/executors/threads.py", "store.open"): "likewise",
    ("engine/whole_file.py", "store.open"): "likewise",
    ("engine/object_store.py", "fs.open"): "sends to a bucket, not to a disk",
    ("sharing/mergekit/reading.py", "read_text"): "reads a text that is there already",
    ("evaluation/harness.py", "subject.open"): "loads a model into memory",
}
"""What is called like that and may stay, with the reason."""


def _calls() -> Iterator[tuple[str, int, str]]:
    """(module, line, call) of everything in the package that is called as if it opened a file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            positioned = last == "read_bytes" and len(node.args) == 3  # `Reader.read_bytes`: a range of an open file
            packaged = called.startswith("(files('safemerge_recipes.")  # of `importlib.resources`: what was installed
            own = packaged or called in ("write_bytes", "check_file")  # of `storage.files`, on descriptors
            if (last in OPENING and not positioned and not own) or last in LOADING or called in ("io.open", "np.load"):
                yield path.relative_to(PACKAGE).as_posix(), node.lineno, called


def test_nothing_in_the_package_opens_a_file_in_another_way() -> None:
    found = list(_calls())
    wrong = [f"{module}:{line}: {call}" for module, line, call in found if (module, call) not in OTHERWISE]
    assert not wrong, "use storage.files: " + ", ".join(wrong)
    assert set(OTHERWISE) == {(module, call) for module, _, call in found}, "an exception that nobody needs"


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _tape(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


HOSTILE = {
    "pipe": (_pipe, "is a pipe; expected a regular file"),
    "socket": (_socket, "is a socket; expected a regular file"),
    "folder": (Path.mkdir, "is a folder; expected a regular file"),
    "device": (_device, "a link that leads out of its folder"),
    "terabyte": (_tape, "larger than 1000 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_ordinary_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = HOSTILE[kind]
    path = tmp_path / "config.json"
    make(path)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for read in (content_of, reading, check_file):
        with pytest.raises(SourceError, match=rf"{re.escape(str(path))}: .*{message}"):
            read(path, 1000)
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_hole_of_a_terabyte_is_refused_at_its_header(tmp_path: Path) -> None:
    """Its header is sound and declares every byte of it: reading it would take hours."""
    path, size = tmp_path / "model.safetensors", 2**38
    text = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    if not path.stat().st_blocks:
        pytest.skip("a file system that does not say what is stored")
    with pytest.raises(SourceError, match="the rest is a hole"):
        read_header(path)
    os.truncate(path, 8 + len(text) + 2**40)
    with pytest.raises(SourceError, match="the limit is 400000000000"):
        read_header(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md"])
def test_a_small_blob_of_the_hub_is_compared_with_its_name(tmp_path: Path, name: str) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    content = b'{"a": 1}'
    blob = blobs / hashlib.sha1(b"blob 8\0" + content).hexdigest()
    blob.write_bytes(content)
    (snapshot / name).symlink_to(blob)
    assert content_of(snapshot / name, 100) == content
    copy_file(snapshot / name, tmp_path / name)
    assert (tmp_path / name).read_bytes() == content
    blob.write_bytes(b'{"a": 2}')
    with pytest.raises(SourceError, match=f"names it {blob.name}; it is damaged or was changed"):
        content_of(snapshot / name, 100)
    (tmp_path / name).unlink()
    with pytest.raises(SourceError, match="download it again"):
        copy_file(snapshot / name, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_device_is_refused_wherever_links_may_lead(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/zero")
    with pytest.raises(SourceError, match="is a device; expected a regular file"):
        content_of(tmp_path / "x", 1000, "any")
    with pytest.raises(SourceError, match="is a link; expected a regular file"):
        open_file(tmp_path / "x", "none")


def test_links_may_lead_inside_or_into_the_cache_of_the_hub(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("secret")
    model = tmp_path / "model"
    model.mkdir()
    (model / "real").write_text("real")
    (model / "link").symlink_to("real")
    (model / "out").symlink_to(outside)
    assert content_of(model / "link", 10) == b"real"
    assert content_of(model / "out", 10, "any") == b"secret"
    for links in ("inside", "none"):
        with pytest.raises((SourceError, OSError)):
            content_of(model / "out", 10, links)
    for kind in ("models", "datasets"):
        snapshot = tmp_path / f"{kind}--org--name" / "snapshots" / "0123" / "below"
        blobs = tmp_path / f"{kind}--org--name" / "blobs"
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True)
        (blobs / "aa").write_text("blob")
        (snapshot / "file").symlink_to(Path("../../../blobs/aa"))
        (snapshot / "out").symlink_to(outside)
        assert content_of(snapshot / "file", 10) == b"blob"
        with pytest.raises(SourceError, match="leads out of its folder"):
            inside(snapshot, "out")


def test_a_file_below_a_folder_is_within_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert within(tmp_path / "a", tmp_path / "a" / "b" / "names.txt")
    (tmp_path / "a" / "link").symlink_to("/etc/hostname")
    for path in (tmp_path / "names.txt", tmp_path / "a" / ".." / "names.txt", tmp_path / "a" / "link"):
        with pytest.raises(SourceError, match="lies outside"):
            within(tmp_path / "a", path)


def test_writing_follows_no_link_and_leaves_nothing_behind(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").symlink_to(victim)
    write_file(tmp_path / "out", "new")
    assert (victim.read_text(), (tmp_path / "out").read_text()) == ("mine", "new")
    with pytest.raises(TypeError), written(tmp_path / "out") as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert (tmp_path / "out").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]


def test_a_folder_exchanged_while_writing_gets_nothing(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    with written(folder / "x") as file:
        folder.rename(tmp_path / "moved")
        folder.symlink_to(elsewhere)
        file.write(b"content")
    assert not list(elsewhere.iterdir())
    assert (tmp_path / "moved" / "x").read_bytes() == b"content"


def test_a_file_of_our_own_is_never_a_link_or_a_pipe(tmp_path: Path) -> None:
    os.close(own_file(tmp_path / "lock"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "lock")
    with pytest.raises(SourceError, match="is a pipe"):
        own_file(tmp_path / "pipe")
    with pytest.raises(OSError, match="link"):
        own_file(tmp_path / "link")
