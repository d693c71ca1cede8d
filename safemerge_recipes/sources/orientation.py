"""Which way round a checkpoint stores its matrices: `(d_out, d_in)`, or `(d_in, d_out)` as GPT-2's Conv1D.

Read off the inventory itself: a layer's bias is as long as its output, so a matrix whose bias fits only its
columns is stored input first. Square matrices follow the others of their checkpoint. Layers that are stored
input first always have a bias, so a matrix without one is stored output first; of fused experts without
biases, the model's hidden size tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.tensor_names import block_of

Shapes = Mapping[str, tuple[int, ...]]


def _bias(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """Shape of the bias that belongs to a weight."""
    root = name.removesuffix(".weight")
    return shapes.get(f"{root}.bias") if root != name else shapes.get(f"{name}_bias")


def _says(name: str, shapes: Shapes) -> bool | None:
    """What a matrix's bias says: input first or not; None if nothing."""
    bias, shape = _bias(name, shapes), shapes[name]
    if bias is None or shape[-1] == shape[-2] or len(bias) != len(shape) - 1:
        return None
    return bias[-1] == shape[-1]


def input_first(shapes: Shapes, config: Mapping[str, Any]) -> frozenset[str]:
    """The matrices, and stacks of matrices, in numbered blocks that are stored `(d_in, d_out)`."""
    matrices = [name for name, shape in shapes.items() if len(shape) in (2, 3) and block_of(name) is not None]
    said = {name: _says(name, shapes) for name in matrices}
    votes = [said[name] for name in matrices if len(shapes[name]) == 2 and said[name] is not None]
    all_turned = bool(votes) and all(votes)
    hidden = setting(config, "hidden_size")
    found = set()
    for name in matrices:
        shape, answer = shapes[name], said[name]
        if answer is None and len(shape) == 2:
            answer = all_turned and _bias(name, shapes) is not None
        elif answer is None and hidden in shape[1:] and shape[1] != shape[2]:
            answer = (shape[1] == hidden) != ("down" in name.rpartition(".")[2])
        if answer:
            found.add(name)
    return frozenset(found)
