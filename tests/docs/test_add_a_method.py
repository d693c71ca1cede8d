"""The page that walks through adding a method, carried out: its blocks become a plugin that merges a tiny family."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fixtures.plain_family import GATED, make_family
from tests.fixtures.program import finish, spawn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text()


def block(file: str) -> str:
    """The block under a file's name."""
    (found,) = re.findall(rf"`{re.escape(file)}`:\n\n```\w+\n(.*?)^```", PAGE, flags=re.M | re.S)
    return found


def test_the_page_adds_a_method(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    for file in ("soft_clip.py", "pyproject.toml", "recipe.yaml"):
        (tmp_path / file).write_text(block(file))
    ((group, name, target),) = re.findall(r'entry-points\."(.+)"\]\n(\w+) = "(.+)"', block("pyproject.toml"))
    info = tmp_path / "safemerge_soft_clip-0.1.0.dist-info"  # what an installation would leave
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: safemerge-soft-clip\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")

    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path, "SAFEMERGE_CACHE": str(tmp_path / "cache")}

    def safemerge(*arguments: str) -> str:
        before = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path[:0] = os.environ['PYTHONPATH'].split(':')"
        code, out, err = finish(spawn(*arguments, before=before, env=environment))
        assert code == 0, err
        return out

    assert "safemerge-soft-clip 0.1.0" in safemerge("plugins")
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    for line in commands.splitlines():
        program, *arguments = line.split()
        safemerge(*(["run"] if program == "safemerge-run" else []), *arguments)

    written = load_file(tmp_path / "merged" / "model.safetensors")
    merged = [name for name in GATED if not torch.equal(written[name], family.finetuned[name].to(written[name].dtype))]
    assert merged
    for name in merged:
        aligned, finetuned = (side[name].double() for side in (family.aligned, family.finetuned))
        delta = finetuned - aligned
        ceiling = 0.5 * delta.square().mean().sqrt()
        wanted = aligned + ceiling * torch.tanh(delta / ceiling)
        assert (written[name].double() - wanted).abs().max() < 1e-6
