"""What an adapter does to one linear or embedding layer: its weight, and its bias."""

from __future__ import annotations

from collections.abc import Mapping

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.peft.application import Application
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight
from safemerge_recipes.weights.operands import Rescaled, Rows

BIASES = {"lora_bias", "base_bias"}
"""Parts of a module that go to its bias; all others go to its weight."""


def adapt_layer(work: Application, module: str, parts: Mapping[str, TensorRef]) -> None:
    """One adapted module with a weight of its own.

    Raises:
        SourceError: the model does not have it, or a tensor does not fit.
    """
    if parts.keys() - BIASES:
        _adapt_weight(work, module, parts)
    if parts.keys() & BIASES:
        _adapt_bias(work, module, parts)


def _adapt_weight(work: Application, module: str, parts: Mapping[str, TensorRef]) -> None:
    """A weight: replaced, added to, rescaled, and with rows of its own, in this order."""
    name = work.target(f"{module}.weight")
    if "base_weight" in parts:
        work.replace(name, parts["base_weight"])
    pair, embedding = work.adapter.keys.pair(module), work.adapter.keys.pair(module, "embedding_")
    below = work.above[name]
    update = None
    if pair is not None:
        update = _low_rank(work, name, module, pair)
    elif embedding is not None:
        a, b = embedding
        update = LowRank(b, a, work.adapter.config.scale(module, a.shape[0]), transposed=True)
        if update.shape != below.shape:
            raise work.refuse_shape(name, update.shape, below.shape)
    if update is not None:
        above = below + Weight.of(update)
        if "magnitude" in parts:
            above = Weight.of(_rescaled(work, name, above, parts["magnitude"], update.transposed))
        work.above[name] = above
    if "tokens" in parts:
        work.above[name] = _with_rows(work, name, module, parts["tokens"])


def _adapt_bias(work: Application, module: str, parts: Mapping[str, TensorRef]) -> None:
    """A bias: replaced, and added to."""
    if "lora_bias" in parts and work.find(f"{module}.bias") is None:
        raise SourceError(
            f"{work.adapter.config.path}: lora_bias is set, but {module} has no bias that the trained one "
            "could be added to; expected layers with a bias (PEFT cannot merge this adapter either)"
        )
    name = work.target(f"{module}.bias")
    if "base_bias" in parts:
        work.replace(name, parts["base_bias"])
    if "lora_bias" in parts:
        bias = parts["lora_bias"]
        if bias.shape != work.above[name].shape:
            raise work.refuse_shape(name, bias.shape, work.above[name].shape)
        a, _ = work.adapter.keys.pair(module) or (bias, bias)
        work.above[name] += work.adapter.config.scale(module, a.shape[0]) * Weight.of(Stored(bias))


def _low_rank(work: Application, name: str, module: str, pair: tuple[TensorRef, TensorRef]) -> LowRank:
    """The update of a linear layer, the way round that its weight is stored."""
    a, b = pair
    scale = work.adapter.config.scale(module, a.shape[0])
    below = work.above[name].shape
    fits = LowRank(b, a, scale, transposed=name in work.turned)
    if fits.shape == below:
        return fits
    other = LowRank(b, a, scale, transposed=name not in work.turned)
    if other.shape == below and work.adapter.config.fan_in_fan_out:
        return other
    raise work.refuse_shape(name, fits.shape, below)


def _rescaled(work: Application, name: str, weight: Weight, magnitude: TensorRef, columns: bool) -> Rescaled:
    """DoRA: every output's weights scaled to a trained length."""
    length = weight.shape[1 if columns else 0]
    if magnitude.numel != length:
        raise work.refuse_shape(f"{name} (lora_magnitude_vector)", magnitude.shape, (length,))
    return Rescaled(weight, magnitude, columns)


def _with_rows(work: Application, name: str, module: str, rows: TensorRef) -> Weight:
    """Trained tokens: some rows replaced."""
    below = work.above[name]
    indices = work.adapter.config.token_indices(module)
    if rows.shape != (len(indices), *below.shape[1:]) or max(indices, default=0) >= below.shape[0]:
        raise SourceError(
            f"{work.adapter.directory}: {name} is {below.shape}, the file holds trained rows {rows.shape}, "
            f"trainable_token_indices names {len(indices)} rows up to {max(indices, default=0)}; they must fit"
        )
    runs: list[tuple[int, int, int]] = []
    at = 0
    for row, number in sorted(zip(indices, range(len(indices)), strict=True)):
        if row > at:
            runs.append((0, at, row - at))
        runs.append((1, number, 1))
        at = row + 1
    if at < below.shape[0]:
        runs.append((0, at, below.shape[0] - at))
    return Weight.of(Rows((below, Weight.of(Stored(rows))), tuple(runs)))
