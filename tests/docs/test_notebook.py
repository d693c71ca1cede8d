"""docs/tutorial.ipynb is what its script makes, and what it shows is what the package says now.

The base model's weights play no part in a plan over adapters, so a model of zeros stands in for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import struct
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

DOCS = Path(__file__).parents[2] / "docs"
HIDDEN, WIDE, KEYS, WORDS, BLOCKS = 576, 1536, 192, 49152, 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDE,
    "num_hidden_layers": BLOCKS, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": WORDS,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zeros(folder: Path) -> Path:
    """A model in the demo's shapes whose weights are a hole in a file."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for block in range(BLOCKS):
        shapes |= {f"model.layers.{block}.{name}.weight": shape for name, shape in SHAPES.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def shown(notebook: Any) -> list[Any]:
    """What the cells show, without what depends on who shows it, or on how a kernel parted what was printed."""

    def of(outputs: Any) -> list[Any]:
        parts = groupby(outputs, key=lambda one: one.get("name"))
        texts = [("".join(one.get("text", "") for one in group), name) for name, group in parts if name]
        return [texts, [one["data"] for one in outputs if "data" in one]]

    return [of(cell.get("outputs", ())) for cell in notebook.cells]


@pytest.mark.slow  # ten seconds: a kernel
def test_the_notebook_shows_what_the_package_does(script: ModuleType, tmp_path: Path) -> None:
    """In an interpreter of its own kind, with tables and pictures."""
    again = script.execute(zeros(tmp_path / "base"))
    assert shown(again) == shown(nbformat.read(DOCS / "tutorial.ipynb", 4))


def test_the_notebook_is_its_script_and_prints_what_the_package_says(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells as plain Python in this process."""
    kept = nbformat.read(DOCS / "tutorial.ipynb", 4)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in script.notebook().cells
    ], "run docs/notebook.py"
    names: dict[str, Any] = {}
    with script.demo(zeros(tmp_path / "base")) as place, monkeypatch.context() as here:
        here.chdir(place)
        for cell in kept.cells:
            if cell.cell_type == "code":
                told = io.StringIO()
                with contextlib.redirect_stdout(told):
                    exec(cell.source, names)
                assert told.getvalue() == "".join(one.text for one in cell.outputs if one.get("name") == "stdout")
    for place in ("/home/", "/root/", "/tmp/", str(DOCS.parent)):
        assert place not in json.dumps(kept)
