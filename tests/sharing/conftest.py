"""Fixtures: a model hub with a family on it."""

from __future__ import annotations

import json

import pytest

from tests.fixtures.hub_server import serve
from tests.fixtures.hub_world import World
from tests.fixtures.plain_family import make_family
from tests.fixtures.program import WarmProgram


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    make_family(root / "family")
    for name in ("base", "aligned"):
        tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        (root / "family" / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (root / "family" / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    with serve() as hub:
        program = WarmProgram(root)
        yield hub, root, program
        program.close()


@pytest.fixture
def world(served, tmp_path):
    """The family on the hub as new, all faults healed, empty caches."""
    hub, root, program = served
    hub.repositories.clear()
    hub.objects.clear()
    for name in ("base", "aligned", "finetuned-adapter", "safety-adapter"):
        hub.add(f"ann/{name}", root / "family" / name)
    hub.forget()
    return World(hub, root / "family", program, tmp_path)
