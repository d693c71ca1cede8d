"""Fixtures: a model hub with a family on it."""

from __future__ import annotations

import json

import pytest

from tests.fixtures.hub_server import serve
from tests.fixtures.hub_world import World
from tests.fixtures.plain_family import make_family
from tests.fixtures.program import WarmProgram

LOADED = (
    *("huggingface_hub.hf_api", "huggingface_hub.file_download", "jinja2", "pydantic.type_adapter", "xxhash"),
    *("rich.console", "rich.jupyter", "rich.progress", "threadpoolctl", "numpy.random", "multiprocessing.synchronize"),
    "safemerge_recipes.gate.measurer", "safemerge_recipes.gate.low_rank", "safemerge_recipes.methods.linear",
    "safemerge_recipes.report.card", "safemerge_recipes.report.console", "safemerge_recipes.report.page",
    "safemerge_recipes.report.terminal", "safemerge_recipes.pipeline.lock", "safemerge_recipes.sharing.places",
    "safemerge_recipes.sharing.publish",
)  # fmt: skip
"""What every run loads. The client reads its settings when it is loaded; `World` has it do so again."""


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    make_family(root / "family")
    for name in ("base", "aligned"):
        tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        (root / "family" / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (root / "family" / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    with serve() as hub:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", hub.url)
            program = WarmProgram(root, *LOADED)
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
