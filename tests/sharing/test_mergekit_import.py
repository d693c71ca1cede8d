"""Imported mergekit files give mergekit's own tensors: ten of its example files in their forms, and what is refused.

The files are written anew with the methods and the forms of parameters that mergekit's repository shows under
`examples/` and in its README; small models stand in for those they name. Guards `sharing.mergekit.settings`,
`sharing.templates`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safemerge_recipes.sharing.mergekit.importing import import_mergekit
from safemerge_recipes.sharing.mergekit.methods import NATIVE
from safemerge_recipes.sharing.mergekit.reading import read_text
from safemerge_recipes.sharing.mergekit.settings import evaluate, patterns
from tests.fixtures.gated_family import Family, make_family, read_weights

pytest.importorskip("mergekit")

Tensors = dict[str, torch.Tensor]

EXAMPLES = {
    "bio-merge": """
        models:
          - {model: finetuned, parameters: {density: 0.5, weight: 0.5}}
          - {model: safety, parameters: {density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: base
        parameters: {normalize: false, int8_mask: true}
        dtype: float32
    """,
    "gradient-slerp": """
        slices:
          - sources:
              - {model: aligned, layer_range: [0, 5]}
              - {model: finetuned, layer_range: [0, 5]}
        merge_method: slerp
        base_model: aligned
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: float32
    """,
    "mega, its second merge": """
        models:
          - {model: finetuned, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - model: safety
            parameters:
              density: 0.33
              weight:
                - {filter: mlp, value: 0.5}
                - {value: 0}
        merge_method: ties
        base_model: aligned
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    "vlm-linear": """
        models:
          - {model: finetuned, parameters: {weight: 1.0}}
          - {model: safety, parameters: {weight: 1.0}}
        merge_method: linear
        dtype: float32
    """,
    "vlm-ties": """
        models:
          - {model: finetuned, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: aligned, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
        merge_method: ties
        base_model: aligned
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    "arcee_fusion": """
        models: [{model: aligned}, {model: finetuned}]
        merge_method: arcee_fusion
        base_model: aligned
        dtype: float32
    """,
}
"""Forms of files under mergekit's `examples/`, by name."""

FORMS = {
    "linear of one's own weights": """
        models:
          - {model: finetuned, parameters: {weight: 0.7}}
          - {model: safety, parameters: {weight: 0.5}}
        merge_method: linear
        parameters: {normalize: false}
    """,
    "linear by filter and gradient": """
        models:
          - {model: finetuned, parameters: {weight: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.6}]}}
          - {model: safety, parameters: {weight: 0.4}}
        merge_method: linear
    """,
    "task_arithmetic": """
        models:
          - {model: finetuned, parameters: {weight: 0.8}}
          - {model: safety, parameters: {weight: [{filter: q_proj, value: -0.3}, {value: 0.4}]}}
        merge_method: task_arithmetic
        base_model: aligned
        parameters: {lambda: 0.9}
    """,
    "task_arithmetic of one": """
        models: [{model: finetuned, parameters: {weight: 0.5}}]
        merge_method: task_arithmetic
        base_model: aligned
    """,
    "ties, rescaled": """
        models:
          - {model: finetuned, parameters: {density: 0.4, weight: 0.6}}
          - {model: safety, parameters: {density: 0.4, weight: 0.3}}
        merge_method: ties
        base_model: aligned
        parameters: {rescale: true, lambda: 1.1}
    """,
    "ties in one line": """
        models: [{model: finetuned}, {model: safety}]
        merge_method: ties
        base_model: aligned
        parameters: {density: 0.6, weight: 0.7}
    """,
    "dare_linear of all": """
        models: [{model: finetuned, parameters: {weight: 0.3}}, {model: safety, parameters: {weight: 0.3}}]
        merge_method: dare_linear
        base_model: aligned
    """,
    "dare_ties of all": """
        models: [{model: finetuned, parameters: {weight: 0.3}}, {model: safety, parameters: {weight: 0.3}}]
        merge_method: dare_ties
        base_model: aligned
        parameters: {density: 1.0}
    """,
    "passthrough": "{slices: [{sources: [{model: finetuned, layer_range: [0, 5]}]}], merge_method: passthrough}",
    "passthrough, scaled": """
        models: [{model: finetuned, parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.5}]}}]
        merge_method: passthrough
    """,
    "slices one after the other": """
        slices:
          - sources: [{model: aligned, layer_range: [0, 2]}, {model: finetuned, layer_range: [0, 2]}]
            parameters: {t: 0.2}
          - sources: [{model: aligned, layer_range: [2, 5]}, {model: finetuned, layer_range: [2, 5]}]
            parameters: {t: [0.5, 0.9]}
        merge_method: slerp
        base_model: aligned
    """,
    "nuslerp": """
        models: [{model: finetuned, parameters: {weight: 0.7}}, {model: safety, parameters: {weight: 0.3}}]
        merge_method: nuslerp
    """,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Five blocks in float32, with norms, embeddings and head that differ between models."""
    return make_family(
        tmp_path_factory.mktemp("five"), "llama", torch.float32, num_hidden_layers=5, architectures=["LlamaForCausalLM"]
    )


def mergekit(text: str, out: Path) -> Tensors:
    """The tensors that mergekit writes for a file."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options=options)
    return read_weights(out)


def written(text: str, family: Family) -> str:
    """A file with the family's folders for the names of models."""
    import textwrap

    return re.sub(r"\b(model|base_model): (\w+)", lambda m: f"{m[1]}: {family / m[2]}", textwrap.dedent(text))


def both(text: str, family: Family, call: Callable[..., Any], folder: Path) -> tuple[Tensors, Tensors]:
    """What mergekit writes, and what the imported recipe does."""
    path = folder / "merge.yml"
    path.write_text(written(text, family))
    done = call("import", path, "-o", folder / "recipe.yaml")
    assert done.code == 0, done.err
    assert call("validate", folder / "recipe.yaml").code == 0
    done = call("run", folder / "recipe.yaml", "-o", folder / "ours")
    assert done.code == 0, done.err
    return mergekit(path.read_text(), folder / "theirs"), read_weights(folder / "ours")


@pytest.mark.parametrize("name", [*EXAMPLES, *FORMS])
def test_an_imported_file_gives_mergekits_tensors(
    name: str, family: Family, call: Callable[..., Any], tmp_path: Path
) -> None:
    theirs, ours = both((EXAMPLES | FORMS)[name], family, call, tmp_path)
    assert set(ours) == set(theirs)
    for tensor, wanted in theirs.items():
        assert ours[tensor].dtype == wanted.dtype
        assert torch.allclose(ours[tensor], wanted, rtol=1e-6, atol=3e-8), (
            f"{tensor} {(ours[tensor] - wanted).abs().max()}"
        )


def test_biases_and_tied_embeddings_come_too(call: Callable[..., Any], tmp_path: Path) -> None:
    qwen = make_family(tmp_path / "qwen", "qwen2", torch.float32, shards=3, architectures=["Qwen2ForCausalLM"])
    theirs, ours = both(EXAMPLES["bio-merge"], qwen, call, tmp_path)
    assert any(name.endswith("bias") for name in ours)
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=3e-8) for name in theirs)
