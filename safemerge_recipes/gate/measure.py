"""Measures one tensor: picks the way in which its moments are found (exact, low_rank or sketch), and takes it.

Neither VVᵀ nor a low-rank Δ is ever formed. Two full matrices are sketched (`sketch`) or multiplied out
(`exact`); where a side is low-rank two passes over the other are exact (`low_rank`). Matrices are streamed in row
pieces of fixed size; products are float32, sums of squares and everything of size r × r float64. Knows nothing of
thresholds or recipes.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

from safemerge_recipes.errors import SourceError
from safemerge_recipes.gate import low_rank
from safemerge_recipes.gate.exact import exact_moments
from safemerge_recipes.gate.moments import Effort, Moments
from safemerge_recipes.gate.sketch import sketched_moments
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights.algebra import Stored, Weight
from safemerge_recipes.weights.dequantise import noise_square
from safemerge_recipes.weights.directions import energy_inside
from safemerge_recipes.weights.matrix import NARROW_PIECE, ROW_PIECE, TorchRows
from safemerge_recipes.weights.operands import leaves
from safemerge_recipes.weights.quantised import Quantised
from safemerge_recipes.weights.spectrum import SMALL

EXACT_SIDE = 640
"""Two full matrices with a side up to this are always measured exactly: a sketch costs two thirds of that, and leaves
a fifth of the tensors open where spectra are flat."""


def exact_null(v: Weight, reader: Reader, arena: Arena, room: int) -> float:
    """‖VᵀV‖² of a full V, exactly. Costs 2·d_out·d_in·min(d_out, d_in) operations."""
    matrix = TorchRows(v, reader, arena, "v", room)
    return exact_moments("", matrix, matrix, arena.device, True).gram


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
            no result; the same for all tensors of a worker, whose arena goes on holding it.
        effort: where both sides are full matrices: `sketch` (with an interval) or `exact` (to rounding); elsewhere
            ρ is exact anyway.
        rank: also measure the energy of Δ inside so many leading left singular directions of V; 0: do not.
        null: whether ρ₀ matters: measure it, too, with that effort; else only roughly.

    Raises:
        SourceError: V or Δ holds NaN or infinite values.
    """
    noise = [noise_square(weight, reader, arena) for weight in (v, delta)]
    if v.is_zero or delta.is_zero:
        squares = [low_rank.square_norm(weight, reader, arena) for weight in (delta, v)]
        found = Moments(overlap=0.0, image=0.0, delta=squares[0], v=squares[1], gram=0.0)
        return replace(found, v_noise=noise[0], delta_noise=noise[1])
    side = min(v.shape[-1], math.prod(v.shape[:-1]))
    if v.low_rank and delta.low_rank:
        found = low_rank.both_low_rank(v, delta, reader, arena)
    elif v.low_rank:
        found = low_rank.low_rank_v(name, v, delta, reader, arena)
    elif delta.low_rank:
        found = low_rank.low_rank_delta(name, v, delta, reader, arena, null)
        if null and effort == "exact" and found.null_error:
            found = replace(found, gram=exact_null(v, reader, arena, room), null_error=0.0)
    else:
        exact = effort == "exact" or side <= EXACT_SIDE
        left, right = (
            TorchRows(weight, reader, arena, slot, room // 2, ROW_PIECE if exact else NARROW_PIECE, again=True)
            for weight, slot in ((v, "v"), (delta, "delta"))
        )
        if exact:
            found = exact_moments(name, left, right, arena.device, null or side <= SMALL)
        else:
            found = sketched_moments(name, left, right, arena.device, null)
    if rank and found.degenerate is None and all(map(math.isfinite, (found.v, found.delta))):
        inside, error = energy_inside(name, v, delta, rank, reader, arena, room, effort == "exact")
        found = replace(found, inside=inside, inside_error=error)
    found = replace(found, v_noise=noise[0], delta_noise=noise[1])
    if not all(math.isfinite(getattr(found, field.name)) for field in fields(found)):
        raise SourceError(_not_finite(name, v, delta, reader, arena))
    return found


def _not_finite(name: str, v: Weight, delta: Weight, reader: Reader, arena: Arena) -> str:
    """Says which stored tensor holds what, for the error message."""
    read = (operand for weight in (v, delta) for operand in leaves(weight))
    stored = (one if isinstance(one, Quantised) else Stored(ref) for one in read for ref in one.refs)
    for operand in dict.fromkeys(stored):
        ref, count = operand.refs[0], 0
        flat = Weight.of(operand)
        for _, piece in TorchRows(flat, reader, arena, "scan", 0):
            count += int((~piece.isfinite()).sum())
        if count:
            return f"{ref.path}: {name}: {count} of {ref.numel} values are NaN or infinite; expected finite weights"
    return f"{name}: the sums of squares overflow; are the weights of a sane size?"
