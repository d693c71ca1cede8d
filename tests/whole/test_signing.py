"""Outputs are signed with a private key and verified with the public one, offline; every other key and bit is refused.

Guards `signing`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("model_signing")
from safemerge_recipes.errors import CheckError
from safemerge_recipes.signing import sign
from tests.fixtures.program import run
from tests.fixtures.sharded_family import make_family
from tests.whole.faults import flip

pytestmark = pytest.mark.filterwarnings("ignore")


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, as openssl makes them."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


@pytest.mark.skipif(shutil.which("openssl") is None, reason="keys are made by openssl")
def test_a_signed_output_is_told_from_every_other(tmp_path: Path) -> None:
    recipe, out = make_family(tmp_path / "family"), tmp_path / "out"
    private, public = keys(tmp_path, "mine")
    _, strange = keys(tmp_path, "strange")
    assert run("run", recipe, "--output", out)[0] == 0
    code, _, err = run("verify", out, "--public-key", public)
    assert (code, err.count("\n")) == (6, 1)
    assert "model.sig: missing" in err

    code, printed, err = run("sign", out, "--private-key", private)
    assert (code, printed) == (0, f"{out / 'model.sig'}\n"), err
    assert run("verify", out)[0] == 0
    code, _, err = run("verify", out, "--public-key", public)
    assert code == 0, err
    assert "checked: signature" in err
    assert "not checked: who wrote the manifest" not in err
    code, _, err = run("verify", out, "--public-key", strange)
    assert (code, err.count("\n")) == (6, 1), err
    for path in sorted(out.iterdir()):
        at = path.stat().st_size * 4
        flip(path, at)
        assert run("verify", out, "--public-key", public)[0] == 6, path.name
        flip(path, at)
    (out / "added.txt").write_text("more")
    assert run("verify", out, "--public-key", public)[0] == 6
    (out / "added.txt").unlink()
    assert run("verify", out, "--public-key", public)[0] == 0

    code, _, err = run("sign", out, "--private-key", public)
    assert (code, err.count("\n")) == (6, 1), err
    code, _, err = run("sign", tmp_path, "--private-key", private)
    assert (code, err.count("\n")) == (6, 1), err


def test_a_key_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pem")
    (tmp_path / "endless.pem").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("endless", "a device")):
        with pytest.raises(CheckError, match=rf"{name}\.pem: is {kind}; expected a regular file"):
            sign(tmp_path, tmp_path / f"{name}.pem")
