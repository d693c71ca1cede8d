"""Where a fuzzed file lies, and the pieces that targets build sound ones from."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
from pathlib import Path

_SHM = Path("/dev/shm")
_folder: Path | None = None


def place() -> Path:
    """A folder of this process, in memory where there is a file system for it."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="safemerge-fuzz-", dir=_SHM if _SHM.is_dir() else None))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder


def lay(name: str, data: bytes) -> Path:
    """A file of that folder, alone with what targets laid beside it."""
    path = place() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def stored(header: object, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, *shape: int) -> dict[str, object]:
    """A float32 tensor in a header."""
    size = 4
    for n in shape:
        size *= n
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, begin + size]}
