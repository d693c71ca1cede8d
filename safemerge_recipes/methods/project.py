"""`project` (Safe LoRA, arXiv 2405.16833): CΔf, the part of the update inside what alignment changed, C ~ VVᵀ.

V and Δ are streamed in pieces of rows. Only the projection of a full-rank Δ is computed a panel of rows at a time, from
as many passes over both as there are panels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Rows, Transform
from safemerge_recipes.methods.products import factor_bytes, left_times, product, ranks, zeros
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Prepare, Sum
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.directions import factors, left_directions
from safemerge_recipes.weights.matrix import ROW_PIECE, TorchRows, panel_width
from safemerge_recipes.weights.spectrum import leading_memory
from safemerge_recipes.weights.torch_factors import working_dtype

if TYPE_CHECKING:
    import torch

PANEL = 512
"""Rows of a projected full-rank Δ that are computed together, or fewer where rows are long."""


def _check_normalization(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"frobenius|spectral|size|rank:[1-9][0-9]{0,4}", value):
        found = f'"{value[:40]}"' if isinstance(value, str) else str(value).lower()[:40]
        method = info.data.get("method", "project")
        raise ValueError(f"found {found}; expected frobenius, spectral, size or rank:k for method {method}")
    return value


def panel_rows(columns: int) -> int:
    """Rows of a panel, by the shape alone: 32 MiB in float32 at most."""
    return min(PANEL, panel_width(columns))


def width_of(*weights: Weight) -> int:
    """Bytes of a number of the products with these."""
    return 8 if any(ref.dtype == "F64" for weight in weights for ref in weight.refs) else 4


Normalization = Annotated[
    str, BeforeValidator(_check_normalization), Field(pattern=r"^(frobenius|spectral|size|rank:[1-9][0-9]{0,4})$")
]


class Project(Merge):
    """The part of Δf inside what alignment changed."""

    method: Literal["project"]
    normalize: Normalization = "frobenius"
    """What VVᵀ is divided by (`project`): `frobenius`, C = VVᵀ/‖V‖_F (default, the published form; its effect depends
    on the scale of V), `spectral`, C = VVᵀ/‖VVᵀ‖₂ (nothing grows, whatever the scale), `size`, the number of V's
    elements, or `rank:k`, the orthogonal projection on the k leading left directions of V."""


@dataclass(frozen=True, slots=True)
class Projection(Transform):
    """CΔ for inputs (V, Δ): Safe LoRA (arXiv 2405.16833).

    `normalize`: "frobenius", C = VVᵀ/‖V‖_F, the published form; "spectral", C = VVᵀ/‖VVᵀ‖₂, whose largest
    eigenvalue is 1 whatever the scale of V; "size", C = VVᵀ/(d_out·d_in); "rank:k", C = U_k·U_kᵀ, the orthogonal
    projection on the k leading left singular directions of V. Where V or Δ is zero, as an untrained expert's is, so
    is CΔ.
    """

    normalize: str
    matrices: ClassVar[str] = "oriented"

    @property
    def rank(self) -> int:
        """k of `rank:k`, 1 for `spectral`, else 0: how many directions of V are wanted."""
        return int(self.normalize.partition(":")[2] or 0) or int(self.normalize == "spectral")

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes: thin matrices; a panel and its products where both sides are of full rank."""
        v, delta = inputs
        columns = shape[-1]
        rows = math.prod(shape) // columns
        own = factor_bytes(self.rank + ranks(v, delta), shape)
        if self.rank and not v.low_rank:
            own += leading_memory(rows, columns, self.rank)
        if not (v.low_rank or delta.low_rank or self.normalize.startswith("rank")):
            height = panel_rows(columns)
            own += width_of(v, delta) * (2 * height * columns + height * max(1, ROW_PIECE // columns))
        return own

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of CΔ."""
        v, delta = inputs
        dtype = working_dtype(*inputs)
        if v.is_zero or delta.is_zero:
            return zeros(shape, dtype, tools)
        if self.normalize.startswith("rank"):
            left = left_directions(name, v, self.rank, tools.reader, tools.arena, tools.room).left
            return product(left, left_times(left, delta, tools), dtype)
        if v.low_rank:
            b, a = factors(v, tools.reader, tools.arena)
            left = b @ (a @ a.T)
            scale = self._scale(name, v, float((left * b).sum()), tools)
            return product(left / scale, left_times(b, delta, tools), dtype)
        matrix = TorchRows(v, tools.reader, tools.arena, "v", tools.room // 2)
        if delta.low_rank:
            return self._narrow(name, v, matrix, *factors(delta, tools.reader, tools.arena), tools, dtype)
        return self._wide(name, v, matrix, delta, tools)

    def _scale(self, name: str, v: Weight, square: float, tools: Tools) -> float:
        """What VVᵀ is divided by, from ‖V‖²; 1 where V is zero in numbers, so that C is, too."""
        if not square:
            return 1.0
        if self.normalize == "frobenius":
            return math.sqrt(square)
        if self.normalize == "size":
            return float(math.prod(v.shape))
        found = left_directions(name, v, 1, tools.reader, tools.arena, tools.room // 2)
        return float(found.values[0]) ** 2

    def _narrow(
        self,
        name: str,
        v: Weight,
        matrix: TorchRows,
        b: torch.Tensor,
        a: torch.Tensor,
        tools: Tools,
        dtype: torch.dtype,
    ) -> Rows:
        """(V(VᵀB))A in two passes over V."""
        import torch

        thin = b.to(matrix.dtype)
        inner = torch.zeros(matrix.columns, b.shape[1], dtype=matrix.dtype, device=tools.arena.device)
        square = 0.0
        for rows, piece in matrix:
            inner.addmm_(piece.T, thin[rows])
            square += float((piece * piece).sum(dim=-1).double().sum())
        left = torch.cat([piece @ inner for _, piece in matrix]).double()
        return product(left / self._scale(name, v, square, tools), a, dtype)

    def _wide(self, name: str, v: Weight, matrix: TorchRows, delta: Weight, tools: Tools) -> Rows:
        """V·(VᵀΔ) by panels of rows: (V_panel·Vᵀ)·Δ, summed over the pieces of rows of V and Δ."""
        import torch

        square = sum(float((piece * piece).sum(dim=-1).double().sum()) for _, piece in matrix)
        scale = self._scale(name, v, square, tools)
        right = TorchRows(delta, tools.reader, tools.arena, "delta", tools.room // 2)
        height, device = panel_rows(matrix.columns), tools.arena.device
        # Two buffers for all panels: the allocator would keep more of freed ones than the budget knows.
        panels = torch.empty(2, min(height, matrix.rows), matrix.columns, dtype=matrix.dtype, device=device)
        at = -1

        def panel(number: int) -> torch.Tensor:
            nonlocal at
            first, last = number * height, min((number + 1) * height, matrix.rows)
            total = panels[1, : last - first]
            if at != number:
                own = matrix.part(first, last, panels[0])
                total.zero_()
                for (_, v_piece), (_, d_piece) in zip(matrix, right, strict=True):
                    total.addmm_(own @ v_piece.T, d_piece)
                total.div_(scale)
                at = number
            return total

        def rows(first: int, last: int) -> torch.Tensor:
            numbers = range(first // height, (last - 1) // height + 1)
            if len(numbers) == 1:
                return panel(numbers[0])[first - numbers[0] * height : last - numbers[0] * height]
            return torch.cat([panel(n)[max(first - n * height, 0) : last - n * height].clone() for n in numbers])

        return rows


def work(merge: Project, sides: Sides) -> Prepare | Sum:
    """W_a + CΔf."""
    if sides.v.is_zero or sides.delta.is_zero:
        return Sum(sides.aligned)  # C = 0, as the published code has it, or nothing to project
    return Prepare(sides.aligned, (sides.v, sides.delta), Projection(merge.normalize))


PROJECT = Method(
    work,
    keys=Project,
    formula="CΔf, C = VVᵀ normalised",
    needs=("base",),
    link="https://arxiv.org/abs/2405.16833",
    low_rank=True,
)
