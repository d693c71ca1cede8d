"""ρ where a side is low-rank: products with a few columns, so that it costs little more than reading.

From LoRA factors Δ = B·A, with M = VᵀB and G = AAᵀ, ‖VᵀΔ‖² = tr(MᵀM·G) and ‖VVᵀΔ‖² = tr((VM)ᵀ(VM)·G): two passes
over V, exact to rounding. ρ₀ comes along in a few more columns, at random. Pieces are numpy arrays where
numpy suffices, and torch tensors otherwise; everything small is float64 in numpy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from safemerge_recipes.gate.moments import Moments, with_null
from safemerge_recipes.gate.null import DELTA_PROBES, NULL_PROBES, NULL_SAMPLES, null_moment, pair_moment
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.matrix import NARROW_PIECE, TorchRows, square_sum
from safemerge_recipes.weights.numpy_rows import NumpyRows, add_product, dot, numpy_factors, numpy_suffices, wide
from safemerge_recipes.weights.spectrum import SMALL, normal


def needs_torch(v: Weight, delta: Weight, device: str) -> bool:
    """Whether measuring these two takes torch, also if only ρ and a rough ρ₀ are asked for."""
    full = not (v.is_zero or delta.is_zero or v.low_rank or delta.low_rank)
    return device != "cpu" or full or not all(weight.is_zero or numpy_suffices(weight) for weight in (v, delta))


def row_pieces(weight: Weight, reader: Reader, arena: Arena) -> NumpyRows | TorchRows:
    """A weight in small pieces of rows, as numpy arrays where that will do."""
    if arena.device == "cpu" and numpy_suffices(weight):
        return NumpyRows(weight, reader, arena, NARROW_PIECE)
    return TorchRows(weight, reader, arena, "rows", piece=NARROW_PIECE)


def factors(weight: Weight, reader: Reader, arena: Arena) -> tuple[np.ndarray, np.ndarray]:
    """(B, A) of a purely low-rank weight, coefficients and scales folded into A, float64."""
    if numpy_suffices(weight):
        return numpy_factors(weight, reader)
    import torch

    from safemerge_recipes.weights.torch_factors import joined_factors

    pair = joined_factors(weight, reader, torch.float64, "cpu")
    assert pair is not None  # callers have asked weight.low_rank
    return pair[0].numpy(), pair[1].numpy()


def square(piece: Any) -> float:
    """‖piece‖² of a numpy array or torch tensor."""
    return dot(piece, piece) if isinstance(piece, np.ndarray) else square_sum(piece)


def square_norm(weight: Weight, reader: Reader, arena: Arena) -> float:
    """‖W‖² of a weight, float64 total."""
    if weight.is_zero:
        return 0.0
    if weight.low_rank:
        b, a = factors(weight, reader, arena)
        return float(np.sum(b.T @ b * (a @ a.T)))
    return math.fsum(square(piece) for _, piece in row_pieces(weight, reader, arena))


def both_low_rank(v: Weight, delta: Weight, reader: Reader, arena: Arena) -> Moments:
    """The moments from the factors alone."""
    (bv, av), (bd, ad) = factors(v, reader, arena), factors(delta, reader, arena)
    gv, hv, gd, cross = av @ av.T, bv.T @ bv, ad @ ad.T, bv.T @ bd
    inner = gv @ cross  # VᵀΔ = A_vᵀ·cross·A_d and VVᵀΔ = B_v·inner·A_d
    hg, own = hv @ gv, bd.T @ bd @ gd
    return Moments(
        overlap=float(np.sum(cross.T @ inner * gd)),
        image=float(np.sum(inner.T @ hv @ inner * gd)),
        delta=float(np.trace(own)),
        delta_gram=float(np.sum(own * own.T)),
        v=float(np.trace(hg)),
        gram=float(np.sum(hg * hg.T)),
        d_out=bv.shape[0],
        inner=float(np.sum(cross * (av @ ad.T))),
        numel=bv.shape[0] * av.shape[1],
    )


def low_rank_v(name: str, v: Weight, delta: Weight, reader: Reader, arena: Arena) -> Moments:
    """Δ streamed once, V from its factors; how many directions carry Δ from random columns."""
    bv, av = factors(v, reader, arena)
    matrix = row_pieces(delta, reader, arena)
    narrow = matrix.lift(bv)
    k = np.zeros((matrix.columns, bv.shape[1]))
    probes, products, total = matrix.lift(normal(name, matrix.columns, DELTA_PROBES)), 0.0, 0.0
    for rows, piece in matrix:
        k += wide(piece.T @ narrow[rows])
        seen = wide(piece @ probes)
        products = products + seen.T @ seen
        total += square(piece)
    gv, hv = av @ av.T, bv.T @ bv
    inner, hg = gv @ k.T, hv @ gv
    return Moments(
        overlap=float(np.sum(k.T * inner)),
        image=float(np.sum(inner * (hv @ inner))),
        delta=total,
        delta_gram=pair_moment(np.asarray(products)),
        v=float(np.trace(hg)),
        gram=float(np.sum(hg * hg.T)),
        d_out=bv.shape[0],
        inner=float(np.sum(k.T * av)),
        numel=bv.shape[0] * av.shape[1],
    )


def low_rank_delta(name: str, v: Weight, delta: Weight, reader: Reader, arena: Arena, null: bool) -> Moments:
    """V streamed twice, Δ from its factors: ρ exact, ρ₀ from random columns S beside those of B."""
    matrix = row_pieces(v, reader, arena)
    b, a = factors(delta, reader, arena)
    rank = b.shape[1]
    left = matrix.lift(np.concatenate([b, normal(name, matrix.rows, NULL_PROBES[null])], axis=1))
    right: Any = matrix.lift(np.zeros((matrix.columns, left.shape[1])))
    total = 0.0
    for rows, piece in matrix:
        add_product(right, piece.T, left[rows], arena)  # Vᵀ·[B | S]
        total += square(piece)
    image = np.zeros((left.shape[1], left.shape[1]))
    for _, piece in matrix:
        part = wide(piece @ right)
        image += part.T @ part
    thin, g = wide(right), a @ a.T
    gram, own = thin.T @ thin, b.T @ b @ g
    moments = Moments(
        overlap=float(np.sum(gram[:rank, :rank] * g)),
        image=float(np.sum(image[:rank, :rank] * g)),
        delta=float(np.trace(own)),
        delta_gram=float(np.sum(own * own.T)),
        v=total,
        gram=0.0,
        d_out=matrix.rows,
        inner=float(np.sum(thin[:, :rank].T * a)),
        numel=matrix.rows * matrix.columns,
    )
    if not total or not math.isfinite(total):
        return moments
    if min(matrix.rows, matrix.columns) <= SMALL:
        return replace(moments, gram=small_gram(matrix))
    found, error = null_moment(gram, image, NULL_SAMPLES[null])
    return with_null(replace(moments, gram=found), matrix.columns, error)


def small_gram(matrix: NumpyRows | TorchRows) -> float:
    """‖VᵀV‖² of a matrix with a short side, from its Gram matrix on that side, in float64."""
    if matrix.columns <= matrix.rows:
        return float(np.square(sum(wide(piece.T @ piece) for _, piece in matrix)).sum())
    total = 0.0
    for _, piece in matrix:
        kept = piece.copy() if isinstance(piece, np.ndarray) else piece.clone()
        total += math.fsum(float(np.square(wide(kept @ other.T)).sum()) for _, other in matrix)
    return total
