"""Merge methods that must see whole matrices: projections on what alignment changed, its leading part, mergekit.

V = W_aligned − W_base and Δ are streamed in row blocks. A result of low rank stays as its two factors; only
the projection of a full-rank Δ is computed a panel of rows at a time, from as many passes over both as there
are panels. Products are float32 (float64 where a float64 tensor takes part), small matrices float64.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError
from safemerge_recipes.methods.base import Rows, Tools
from safemerge_recipes.storage.cut import BLOCK
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.directions import factors, left_directions
from safemerge_recipes.weights.matrix import ROW_BLOCK, Streamed
from safemerge_recipes.weights.spectrum import leading_memory
from safemerge_recipes.weights.torch_rows import Evaluator, working_dtype

if TYPE_CHECKING:
    import torch

PANEL = 512
"""Rows of a projected full-rank Δ that are computed together."""


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Rows:
    """The rows of left @ right, `(rows, r)` and `(r, columns)`."""
    left, right = left.to(dtype), right.to(dtype)
    return lambda first, last: left[first:last] @ right


def _left_times(left: torch.Tensor, delta: Weight, tools: Tools) -> torch.Tensor:
    """leftᵀ·Δ for a thin `left` `(rows, r)`, float64: one pass over Δ, or none where it is of low rank."""
    import torch

    if delta.low_rank:
        b, a = factors(delta, tools.reader, tools.arena)
        return (left.T @ b) @ a
    matrix = Streamed(delta, tools.reader, tools.arena, "delta", 0)
    narrow = left.to(matrix.dtype)
    total = torch.zeros(left.shape[1], matrix.columns, dtype=matrix.dtype, device=tools.arena.device)
    for rows, block in matrix:
        total.addmm_(narrow[rows].T, block)
    return total.double()


def _thin_bytes(rank: int, shape: tuple[int, ...]) -> int:
    """Bytes of thin matrices of this rank and their float64 originals, and of the streamed blocks."""
    columns = shape[-1]
    rows = math.prod(shape) // columns
    return 4 * 8 * rank * (rows + columns) + 2 * max(ROW_BLOCK, columns) * (4 * 3 + 8)


def _ranks(*weights: Weight) -> int:
    return sum(operand.rank for weight in weights for _, operand in weight if hasattr(operand, "rank"))


@dataclass(frozen=True, slots=True)
class Project:
    """CΔ for inputs (V, Δ): Safe LoRA (arXiv 2405.16833).

    `normalize`: "frobenius", C = VVᵀ/‖V‖_F, the published form; "spectral", C = VVᵀ/‖VVᵀ‖₂, whose largest
    eigenvalue is 1 whatever the scale of V; "rank:k", C = U_k·U_kᵀ, the orthogonal projection on the k leading
    left singular directions of V.
    """

    normalize: str

    @property
    def rank(self) -> int:
        """k of `rank:k`, 1 for `spectral`, else 0: how many directions of V are wanted."""
        return int(self.normalize.partition(":")[2] or 0) or int(self.normalize == "spectral")

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes: thin matrices; a panel and its products where both sides are of full rank."""
        v, delta = inputs
        columns = shape[-1]
        rows = math.prod(shape) // columns
        own = _thin_bytes(self.rank + _ranks(v, delta), shape)
        if self.rank and not v.low_rank:
            own += leading_memory(rows, columns, self.rank)
        if not (v.low_rank or delta.low_rank or self.normalize.startswith("rank")):
            own += 8 * (2 * PANEL * columns + PANEL * max(1, ROW_BLOCK // columns))
        return own

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of CΔ."""
        v, delta = inputs
        dtype = working_dtype(*inputs)
        if self.normalize.startswith("rank"):
            left = left_directions(name, v, self.rank, tools.reader, tools.arena, tools.room).left
            return _product(left, _left_times(left, delta, tools), dtype)
        if v.low_rank:
            b, a = factors(v, tools.reader, tools.arena)
            left = b @ (a @ a.T)
            scale = self._scale(name, v, float((left * b).sum()), tools)
            return _product(left / scale, _left_times(b, delta, tools), dtype)
        matrix = Streamed(v, tools.reader, tools.arena, "v", tools.room // 2)
        if delta.low_rank:
            return self._narrow(name, v, matrix, *factors(delta, tools.reader, tools.arena), tools, dtype)
        return self._wide(name, v, matrix, delta, tools)

    def _scale(self, name: str, v: Weight, square: float, tools: Tools) -> float:
        """What VVᵀ is divided by, from ‖V‖²; 1 where V is zero in numbers, so that C is, too."""
        if not square:
            return 1.0
        if self.normalize == "frobenius":
            return math.sqrt(square)
        found = left_directions(name, v, 1, tools.reader, tools.arena, tools.room // 2)
        return float(found.values[0]) ** 2

    def _narrow(
        self, name: str, v: Weight, matrix: Streamed, b: torch.Tensor, a: torch.Tensor, tools: Tools, dtype: torch.dtype
    ) -> Rows:
        """(V(VᵀB))A in two passes over V."""
        import torch

        thin = b.to(matrix.dtype)
        inner = torch.zeros(matrix.columns, b.shape[1], dtype=matrix.dtype, device=tools.arena.device)
        square = 0.0
        for rows, block in matrix:
            inner.addmm_(block.T, thin[rows])
            square += float((block * block).sum(dim=-1).double().sum())
        left = torch.cat([block @ inner for _, block in matrix]).double()
        return _product(left / self._scale(name, v, square, tools), a, dtype)

    def _wide(self, name: str, v: Weight, matrix: Streamed, delta: Weight, tools: Tools) -> Rows:
        """V·(VᵀΔ) by panels of rows: (V_panel·Vᵀ)·Δ, summed over the row blocks of V and Δ."""
        import torch

        square = sum(float((block * block).sum(dim=-1).double().sum()) for _, block in matrix)
        scale = self._scale(name, v, square, tools)
        right = Streamed(delta, tools.reader, tools.arena, "delta", tools.room // 2)
        made: dict[int, torch.Tensor] = {}

        def panel(number: int) -> torch.Tensor:
            if number not in made:
                made.clear()
                own = matrix.part(number * PANEL, min((number + 1) * PANEL, matrix.rows))
                total = torch.zeros(len(own), matrix.columns, dtype=matrix.dtype, device=tools.arena.device)
                for (_, v_block), (_, d_block) in zip(matrix, right, strict=True):
                    total.addmm_(own @ v_block.T, d_block)
                made[number] = total.div_(scale)
            return made[number]

        def rows(first: int, last: int) -> torch.Tensor:
            numbers = range(first // PANEL, (last - 1) // PANEL + 1)
            pieces = [panel(n)[max(first - n * PANEL, 0) : last - n * PANEL] for n in numbers]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return rows


@dataclass(frozen=True, slots=True)
class SvdK:
    """γ·SVD_k(V) = γ·U_k·U_kᵀ·V for inputs (V,): the leading part of the safety vector (LoX, arXiv 2506.15606)."""

    gamma: float
    rank: int

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes of thin matrices."""
        columns = shape[-1]
        return _thin_bytes(self.rank + _ranks(*inputs), shape) + leading_memory(
            math.prod(shape) // columns, columns, self.rank
        )

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of γ·U_k·(U_kᵀV)."""
        (v,) = inputs
        left = left_directions(name, v, self.rank, tools.reader, tools.arena, tools.room).left
        return _product(left * self.gamma, _left_times(left, v, tools), working_dtype(v))


# mergekit

_GENERATOR = threading.Lock()  # mergekit draws from torch's global generator: one tensor at a time seeds and uses it


@dataclass(frozen=True, slots=True)
class Mergekit:
    """A method of mergekit on whole float32 weights; inputs in the order of `roles`.

    Attributes:
        method: its name there.
        roles: names of the inputs, as `options` may address them.
        base: the position of mergekit's base model among them, or None.
        parameters: its parameters; per-input ones are mappings by role.
        seed: seeds the random choices of a tensor, together with its name.
    """

    method: str
    roles: tuple[str, ...]
    base: int | None
    parameters: tuple[tuple[str, Any], ...]
    seed: int

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes: the inputs, the result and what its methods were seen to need besides, all whole and float32."""
        return 4 * math.prod(shape) * (len(inputs) + MERGEKIT_COPIES)

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of mergekit's result."""
        import torch
        from mergekit.merge_methods import merge_tensors

        tensors = [_whole(weight, shape, tools) for weight in inputs]
        try:
            with _GENERATOR, torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(tensor_seed(self.seed, name))
                merged = merge_tensors(
                    tensors, self.method, parameters=_by_role(self.parameters), ids=self.roles,
                    base_index=self.base, name=name, dtype=torch.float32, out_dtype=torch.float32,
                )  # fmt: skip
        except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError) as error:
            raise PlanError(
                f"merge.method: mergekit:{self.method}: {name}: mergekit says: {str(error)[:500]}; check merge.options"
            ) from None
        merged = merged.reshape(-1, shape[-1])
        return lambda first, last: merged[first:last].clone()


MERGEKIT_COPIES = 16
"""Whole float32 tensors that mergekit's methods need besides their inputs; 15 at most were seen, result included."""


def tensor_seed(seed: int, name: str) -> int:
    """The seed of one tensor's random choices, so that they do not depend on what was merged before."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7], "little")


def _by_role(parameters: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    return {key: dict(value) if isinstance(value, tuple) else value for key, value in parameters}


def _whole(weight: Weight, shape: tuple[int, ...], tools: Tools) -> torch.Tensor:
    import torch

    whole = torch.empty(math.prod(shape), dtype=torch.float32, device=tools.arena.device)
    evaluate = Evaluator((weight,), tools.reader, tools.arena, "whole", working_dtype(weight))
    step = max(1, BLOCK // shape[-1]) * shape[-1]
    for first in range(0, len(whole), step):
        last = min(first + step, len(whole))
        whole[first:last] = evaluate(first, last)[0]
    return whole.reshape(shape)
