"""The floor: the time to read every input byte once and write the output once, with no arithmetic at all.

No program that makes this output from these inputs can be faster on this machine by reading files. Threads
pread into one reused 4 MB buffer each and pwrite from it. Imports neither torch nor numpy. With `--promises` it
also does what a manifest and a finished output promise: sha256 of every file read and written, and the output on
the disk before it ends.

    python -m benchmarks.peers.floor --inputs A/ B/model.safetensors --output out.bin --threads 2
"""

from __future__ import annotations

import argparse
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Lock

PLAIN = argparse.RawDescriptionHelpFormatter
BLOCK = 4 << 20  # bytes


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a folder, or the file itself."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def run_floor(inputs: list[Path], output: Path | None, output_bytes: int, threads: int) -> None:
    """Read all of `inputs` and write `output_bytes` bytes to `output`, block by block in parallel.

    Reads and writes alternate as they would in a merge: a thread takes the next block of every input, then
    writes the block of the output at the same position.
    """
    sizes = [path.stat().st_size for path in inputs]
    descriptors = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if output else None
    if target is not None:
        os.ftruncate(target, output_bytes)
    else:
        output_bytes = 0
    end = max([*sizes, output_bytes])
    turn = Lock()  # the kernel lets one thread at a time write to a file, and has the others spin
    positions = count(0, BLOCK)  # next() on it is atomic under the interpreter lock

    def work() -> None:
        buffer = memoryview(bytearray(BLOCK))
        while (at := next(positions)) < end:
            for descriptor, size in zip(descriptors, sizes, strict=True):
                position, stop = at, min(at + BLOCK, size)
                while position < stop:
                    position += os.preadv(descriptor, [buffer[: stop - position]], position)
            if target is None:
                continue
            position, stop = at, min(at + BLOCK, output_bytes)
            with turn:
                while position < stop:
                    position += os.pwrite(target, buffer[: stop - position], position)

    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(work) for _ in range(threads)]:
            job.result()
    for descriptor in [*descriptors, *([] if target is None else [target])]:
        os.close(descriptor)


def keep_promises(inputs: list[Path], output: Path, threads: int) -> None:
    """Flush the output to the disk while all files are hashed, each by one thread."""

    def digest(path: Path) -> str:
        with path.open("rb", buffering=0) as file:
            found, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
            while count := file.readinto(buffer):
                found.update(buffer[:count])
        return found.hexdigest()

    def flush() -> None:
        with output.open("rb") as file:
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads + 1) as pool:
        flushed = pool.submit(flush)
        list(pool.map(digest, [output, *inputs]))
        flushed.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=PLAIN)
    parser.add_argument("--inputs", nargs="+", type=Path, required=True, help="files or folders of safetensors")
    parser.add_argument("--output", type=Path, help="file to write; nothing is written without it")
    parser.add_argument("--like", type=Path, help="write as many bytes as this one holds (default: first input)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--promises", action="store_true", help="hash everything, flush the output")
    options = parser.parse_args()
    files = [file for path in options.inputs for file in weight_files(path)]
    like = weight_files(options.like or options.inputs[0])
    run_floor(files, options.output, sum(file.stat().st_size for file in like), options.threads)
    if options.promises and options.output:
        keep_promises(files, options.output, options.threads)


if __name__ == "__main__":
    main()
