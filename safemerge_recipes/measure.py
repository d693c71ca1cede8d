"""The gate's reading of one tensor: how far the update lies in the subspace that alignment changed.

For V = W_aligned − W_base and Δ = W_finetuned − W_aligned, both `(d_out, d_in)`, the paper's gate
(arXiv 2503.17239) is ρ = cos(VVᵀΔ, Δ) = ‖VᵀΔ‖² / (‖VVᵀΔ‖·‖Δ‖). Neither VVᵀ nor a low-rank Δ is ever
formed: from LoRA factors Δ = B·A, with M = VᵀB and G = AAᵀ, ‖VᵀΔ‖² = tr(MᵀM·G) and
‖VVᵀΔ‖² = tr((VM)ᵀ(VM)·G). Matrices are streamed in row blocks of fixed size; products are float32, sums of
squares and everything of size r × r float64. Knows nothing of thresholds or recipes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from safemerge_recipes.algebra import Weight
from safemerge_recipes.blocks import Arena, Reader
from safemerge_recipes.errors import SourceError
from safemerge_recipes.kernels import Evaluator, joined_factors, working_dtype
from safemerge_recipes.spectrum import NEGLIGIBLE, Leading, leading, leading_of_gram, normal

if TYPE_CHECKING:
    import numpy as np
    import torch

ROW_BLOCK = 1 << 20
"""Elements of a row block of the streamed matrices ..."""
THIN_BLOCK = 1 << 18
"""... and where products have but a few columns: its float32 form is 1 MiB and stays in a core's cache."""
NULL_PROBES = {False: 8, True: 48}
"""Random columns for ρ₀, by whether the metric looks at it."""
PANEL = 1024
"""Columns of the exact d × d products held at once."""
Effort = Literal["sketch", "exact"]
"""How hard a measurement tries."""
SMALL = 256
"""ρ₀ of matrices with a side up to this is always exact: sketching it would cost as much."""
EXACT_SIDE = 640
"""Two full matrices with a side up to this are always measured exactly: a sketch costs two thirds of that, and leaves
a fifth of the tensors open where spectra are flat."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of squares from which every measure of a tensor, or of a group of tensors, follows.

    They add up: the moments of a block-diagonal group are the sums of its members'.

    Attributes:
        overlap: ‖VᵀΔ‖².
        image: ‖VVᵀΔ‖².
        delta: ‖Δ‖².
        v: ‖V‖².
        gram: ‖VᵀV‖².
        rho_error: half-width of ρ's interval; 0 where ρ is exact to rounding.
        null_error: half-width of ρ₀'s interval; 0 where it is exact to rounding.
        d_out: rows of the tensor.
        inner: ⟨V, Δ⟩.
        inside: ‖U_kᵀΔ‖² for the k leading left singular directions of V; 0 unless asked for.
        inside_error: half-width of its interval.
        overlap_error: half-width of the overlap's own interval.
        image_error: half-width of the image's own interval.
        numel: elements of the tensor.
    """

    overlap: float
    image: float
    delta: float
    v: float
    gram: float
    rho_error: float = 0.0
    null_error: float = 0.0
    d_out: int = 0
    inner: float = 0.0
    inside: float = 0.0
    inside_error: float = 0.0
    overlap_error: float = 0.0
    image_error: float = 0.0
    numel: int = 0

    @property
    def degenerate(self) -> str | None:
        """What makes ρ undefined, if anything: "V is zero" or "the update is zero"."""
        return "V is zero" if self.v == 0 else "the update is zero" if self.delta == 0 else None

    @property
    def rho(self) -> float | None:
        """ρ in [0, 1]; 0 for an update orthogonal to V, None where undefined."""
        if self.degenerate:
            return None
        below = math.sqrt(self.image) * math.sqrt(self.delta)
        return min(1.0, self.overlap / below) if below else 0.0

    @property
    def rho_null(self) -> float | None:
        """ρ₀ ≈ √(PR / d_out), PR = ‖V‖⁴ / ‖VᵀV‖²: what an update unrelated to V would show."""
        return min(1.0, self.v / math.sqrt(self.gram * self.d_out)) if self.gram else None

    def __add__(self, other: Moments) -> Moments:
        total = Moments(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))
        if not total.rho_error:
            return total
        # ρ's own interval is narrower than what its parts allow, but only the parts' intervals add up.
        high = total.overlap + total.overlap_error
        low = math.sqrt(max(total.image - total.image_error, 0.0)) * math.sqrt(total.delta)
        error = min(1.0, high / low) - (total.rho or 0.0) if low else 1.0
        return replace(total, rho_error=max(error, total.rho_error))


def with_null(moments: Moments, columns: int, error: float) -> Moments:
    """The moments with ρ₀'s interval, from that of ‖VᵀV‖² and from what it can be for a V `(d_out, columns)`."""
    least = moments.v**2 / min(moments.d_out, columns)  # all directions alike; ‖V‖⁴ where there is but one
    found, low, high = (
        replace(moments, gram=min(max(moments.gram + by, least), moments.v**2)) for by in (0.0, -error, error)
    )
    null = found.rho_null or 0.0
    return replace(found, null_error=max((low.rho_null or 0.0) - null, null - (high.rho_null or 0.0)))


class Streamed:
    """A weight as row blocks of a matrix `(rows, columns)`; kept in memory if it fits `room` bytes."""

    def __init__(
        self, weight: Weight, reader: Reader, arena: Arena, slot: str, room: int = 0, block: int = ROW_BLOCK
    ) -> None:
        self.columns = weight.shape[-1]
        self.rows = math.prod(weight.shape) // self.columns
        self.dtype, self._device = working_dtype(weight), arena.device
        self._evaluate = Evaluator((weight,), reader, arena, slot, self.dtype)
        self._step = max(1, block // self.columns)
        self._hold = self.rows * self.columns * self.dtype.itemsize <= room
        self._held: list[tuple[slice, torch.Tensor]] = []

    def lift(self, x: np.ndarray) -> torch.Tensor:
        """The array as it goes into products with the blocks."""
        import torch

        return torch.from_numpy(x).contiguous().to(self._device, self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, block `(len(rows), columns)`); a block is valid until the next one unless held."""
        if self._held:
            yield from self._held
            return
        held = []
        for first in range(0, self.rows, self._step):
            last = min(first + self._step, self.rows)
            (block,) = self._evaluate(first * self.columns, last * self.columns)
            block = block.view(-1, self.columns)
            if self._hold:
                block = block.clone()
                held.append((slice(first, last), block))
            yield slice(first, last), block
        self._held = held

    def part(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last), in memory of their own."""
        (block,) = self._evaluate(first * self.columns, last * self.columns)
        return block.view(-1, self.columns).clone()

    def panel(self, columns: slice) -> torch.Tensor:
        """All rows of some columns, `(rows, len(columns))`. Reads the whole matrix again unless it is held."""
        import torch

        return torch.cat([block[:, columns].clone() for _, block in self])


def square_sum(x: torch.Tensor) -> float:
    """‖x‖²: each row's norm in the tensor's dtype, total in float64."""
    import torch

    return float(torch.linalg.vector_norm(x, dim=-1).double().square().sum())


def _factors(weight: Weight, reader: Reader, arena: Arena) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) of a purely low-rank weight, coefficients and scales folded into A."""
    import torch

    pair = joined_factors(weight, reader, torch.float64, arena.device)
    assert pair is not None  # callers have asked weight.low_rank
    return pair


def normal_probes(name: str, columns: int, count: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Standard normal probes `(columns, count)`, the same for the same tensor name everywhere."""
    import torch

    return torch.from_numpy(normal(name, columns, count)).to(device=device, dtype=dtype)


def orthonormal(x: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of x, computed in float64."""
    import torch

    return torch.linalg.qr(x.double()).Q.to(x.dtype)


def gram_moment(rows: torch.Tensor, exact: int, quantile: float) -> tuple[float, float]:
    """(‖VᵀV‖², relative half-width of its interval) from the rows of VᵀV·[P | X].

    Args:
        rows: `(exact + m, d_in)`: the products with an orthonormal P, then with m probes orthogonal to it.
        exact: how many belong to P.
        quantile: half-width in standard errors.
    """
    samples = rows[exact:].double().square().sum(dim=1)
    total = square_sum(rows[:exact]) + float(samples.mean())
    return total, quantile * float(samples.std()) / math.sqrt(len(samples)) / total if total else 0.0


def _exact(name: str, v: Streamed, delta: Streamed, device: str, null: bool) -> Moments:
    """Both dense, exactly: products on the smaller side of V, `PANEL` columns at a time.

    Where V is tall its Gram matrix is not needed for ρ, so ρ₀ comes from random columns unless `null`.
    """
    import torch

    from safemerge_recipes.thin import NULL_SAMPLES, null_moment, wide

    overlap = image = gram = v_square = delta_square = inner = 0.0
    tall = v.columns <= v.rows
    probes = normal_probes(name, v.rows, NULL_PROBES[True] if tall and not null else 0, v.dtype, device)
    right = torch.zeros(v.columns, probes.shape[1], dtype=v.dtype, device=device)
    for (rows, v_block), (_, d_block) in zip(v, delta, strict=True):
        v_square += square_sum(v_block)
        delta_square += square_sum(d_block)
        inner += inner_product(v_block, d_block)
        right.addmm_(v_block.T, probes[rows])
    seen = torch.zeros(probes.shape[1], probes.shape[1], dtype=torch.float64, device=device)
    side = min(v.rows, v.columns)
    for first in range(0, side, PANEL):
        part = slice(first, min(first + PANEL, side))
        width = part.stop - part.start
        if tall:  # T = VᵀΔ by columns, and VᵀV
            t = torch.zeros(v.columns, width, dtype=v.dtype, device=device)
            vtv = torch.zeros(v.columns, width if null else 0, dtype=v.dtype, device=device)
            for (_, v_block), (_, d_block) in zip(v, delta, strict=True):
                t.addmm_(v_block.T, d_block[:, part])
                if null:
                    vtv.addmm_(v_block.T, v_block[:, part])
            overlap += square_sum(t)
            gram += square_sum(vtv)
            for _, v_block in v:
                image += square_sum(v_block @ t)
                if not null and not first:
                    found = (v_block @ right).double()
                    seen.addmm_(found.T, found)
        else:  # wide: rows of S = VVᵀ, then SΔ
            s = torch.zeros(width, v.rows, dtype=v.dtype, device=device)
            panels = [slice(c, min(c + PANEL, v.columns)) for c in range(0, v.columns, PANEL)]
            for columns in panels:
                block = v.panel(columns)
                s.addmm_(block[part], block.T)
            gram += square_sum(s)
            for columns in panels:
                block = delta.panel(columns)
                projected = s @ block
                image += square_sum(projected)
                overlap += float((projected * block[part]).sum(dim=-1).double().sum())
    moments = Moments(overlap, image, delta_square, v_square, gram, d_out=v.rows, inner=inner, numel=v.rows * v.columns)
    if null or not tall or not v_square or not math.isfinite(v_square):
        return moments
    gram, error = null_moment(wide(right.T.double() @ right.double()), wide(seen), NULL_SAMPLES[True])
    return with_null(replace(moments, gram=gram), v.columns, error)


def left_directions(
    name: str, v: Weight, rank: int, reader: Reader, arena: Arena, room: int, exact: bool = False
) -> Leading:
    """The leading left singular directions of V: exact from its factors or its Gram matrix, else by iteration."""
    import torch

    if v.low_rank:
        b, a = _factors(v, reader, arena)
        q, r = torch.linalg.qr(b)
        left, values, _ = torch.linalg.svd(r @ torch.linalg.qr(a.T).R.T, full_matrices=False)
        real = values[:rank] > NEGLIGIBLE * values[:1]
        return Leading((q @ left[:, :rank])[:, real], values[:rank][real], 0.0)
    matrix = Streamed(v, reader, arena, "v", room)
    if not exact and min(matrix.rows, matrix.columns) > SMALL:
        return leading(matrix, rank, name, arena.device)
    side = min(matrix.rows, matrix.columns)
    gram = torch.zeros(side, side, dtype=torch.float64, device=arena.device)
    if matrix.columns <= matrix.rows:
        for _, block in matrix:
            wide = block.double()
            gram.addmm_(wide.T, wide)
        right, values = leading_of_gram(gram, rank)
        left = torch.cat([block.double() @ right for _, block in matrix])
        left /= left.norm(dim=0)
    else:
        for first in range(0, matrix.columns, PANEL):
            panel = matrix.panel(slice(first, min(first + PANEL, matrix.columns))).double()
            gram.addmm_(panel, panel.T)
        left, values = leading_of_gram(gram, rank)
    return Leading(left, values, 0.0)


def energy_inside(
    name: str, v: Weight, delta: Weight, rank: int, reader: Reader, arena: Arena, room: int, exact: bool
) -> tuple[float, float]:
    """‖U_kᵀΔ‖² for the `rank` leading left singular directions of V, and the half-width of its interval."""
    import torch

    found = left_directions(name, v, rank, reader, arena, room, exact)
    if delta.low_rank:
        b, a = _factors(delta, reader, arena)
        inside, total = found.left.T @ b, float((b.T @ b * (a @ a.T)).sum())
        energy = float((inside.T @ inside * (a @ a.T)).sum())
    else:
        matrix = Streamed(delta, reader, arena, "delta", 0)
        narrow = found.left.to(matrix.dtype)
        product = torch.zeros(narrow.shape[1], matrix.columns, dtype=matrix.dtype, device=arena.device)
        total = 0.0
        for rows, block in matrix:
            product.addmm_(narrow[rows].T, block)
            total += square_sum(block)
        energy = square_sum(product)
    return energy, found.error * total  # |‖PΔ‖² − ‖P̃Δ‖²| ≤ ‖P − P̃‖·‖Δ‖², the sine of the largest angle


def inner_product(x: torch.Tensor, y: torch.Tensor) -> float:
    """⟨x, y⟩, summed like `square_sum`."""
    return float((x * y).sum(dim=-1).double().sum())


def exact_null(v: Weight, reader: Reader, arena: Arena, room: int) -> float:
    """‖VᵀV‖² of a dense V, exactly. Costs 2·d_out·d_in·min(d_out, d_in) operations."""
    matrix = Streamed(v, reader, arena, "v", room)
    return _exact("", matrix, matrix, arena.device, True).gram


def measure(
    name: str,
    v: Weight,
    delta: Weight,
    reader: Reader,
    arena: Arena,
    room: int,
    effort: Effort = "sketch",
    rank: int = 0,
    null: bool = False,
) -> Moments:
    """The moments of one tensor, `(d_out, d_in)`; a stack of matrices is measured as one tall matrix.

    Args:
        name: names the tensor in errors and seeds its sketch.
        v: W_aligned − W_base.
        delta: W_finetuned − W_aligned.
        reader: open files.
        arena: the worker's buffers.
        room: bytes that may be used to keep a matrix between passes instead of reading it again; changes
            no result.
        effort: where both sides are full matrices: `sketch` (with an interval) or `exact` (to rounding); elsewhere
            ρ is exact anyway.
        rank: also measure the energy of Δ inside so many leading left singular directions of V; 0: do not.
        null: whether ρ₀ matters: measure it, too, with that effort; else only roughly.

    Raises:
        SourceError: V or Δ holds NaN or infinite values.
    """
    from safemerge_recipes import thin

    if v.is_zero or delta.is_zero:
        squares = [thin.square_norm(weight, reader, arena) for weight in (delta, v)]
        return Moments(overlap=0.0, image=0.0, delta=squares[0], v=squares[1], gram=0.0)
    side = min(v.shape[-1], math.prod(v.shape[:-1]))
    if v.low_rank and delta.low_rank:
        found = thin.both_low_rank(v, delta, reader, arena)
    elif v.low_rank:
        found = thin.low_rank_v(v, delta, reader, arena)
    elif delta.low_rank:
        found = thin.dense_v(name, v, delta, reader, arena, null)
        if null and effort == "exact" and found.null_error:
            found = replace(found, gram=exact_null(v, reader, arena, room), null_error=0.0)
    else:
        exact = effort == "exact" or side <= EXACT_SIDE
        left, right = (
            Streamed(weight, reader, arena, slot, room // 2, ROW_BLOCK if exact else THIN_BLOCK)
            for weight, slot in ((v, "v"), (delta, "delta"))
        )
        if exact:
            found = _exact(name, left, right, arena.device, null or side <= SMALL)
        else:
            from safemerge_recipes.deflated import deflated

            found = deflated(name, left, right, arena.device, null)
    if rank and found.degenerate is None and all(map(math.isfinite, (found.v, found.delta))):
        inside, error = energy_inside(name, v, delta, rank, reader, arena, room, effort == "exact")
        found = replace(found, inside=inside, inside_error=error)
    if not all(math.isfinite(getattr(found, field.name)) for field in fields(found)):
        raise SourceError(_not_finite(name, v, delta, reader, arena))
    return found


def _not_finite(name: str, v: Weight, delta: Weight, reader: Reader, arena: Arena) -> str:
    """Says which stored tensor holds what, for the error message."""
    from safemerge_recipes.algebra import Stored

    for ref in dict.fromkeys((*v.refs, *delta.refs)):
        count = 0
        flat = Weight.of(Stored(ref))
        for _, block in Streamed(flat, reader, arena, "scan", 0):
            count += int((~block.isfinite()).sum())
        if count:
            return f"{ref.path}: {name}: {count} of {ref.numel} values are NaN or infinite; expected finite weights"
    return f"{name}: the sums of squares overflow; are the weights of a sane size?"
