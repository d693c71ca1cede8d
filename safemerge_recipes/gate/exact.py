"""The moments of two full matrices, exactly: 4·d_out·d_in·min(d_out, d_in) operations."""

from __future__ import annotations

import math
from dataclasses import replace

from safemerge_recipes.gate.moments import Moments, with_null
from safemerge_recipes.gate.null import DELTA_PROBES, NULL_PROBES, NULL_SAMPLES, null_moment, pair_moment
from safemerge_recipes.weights.matrix import TorchRows, inner_product, panel_width, square_sum
from safemerge_recipes.weights.spectrum import normal_probes


def exact_moments(name: str, v: TorchRows, delta: TorchRows, device: str, null: bool) -> Moments:
    """Of two full matrices, exactly: products on the smaller side of V, a panel of columns at a time.

    Where V is tall its Gram matrix is not needed for ρ, so ρ₀ comes from random columns unless `null`.
    """
    import torch

    overlap = image = gram = v_square = delta_square = inner = 0.0
    tall = v.columns <= v.rows
    probes = normal_probes(name, v.rows, NULL_PROBES[True] if tall and not null else 0, v.dtype, device)
    right = torch.zeros(v.columns, probes.shape[1], dtype=v.dtype, device=device)
    beside = normal_probes(name + "\0delta", v.columns, DELTA_PROBES, v.dtype, device)
    products = torch.zeros(DELTA_PROBES, DELTA_PROBES, dtype=torch.float64, device=device)
    for (rows, v_piece), (_, d_piece) in zip(v, delta, strict=True):
        found = (d_piece @ beside).double()
        products.addmm_(found.T, found)
        v_square += square_sum(v_piece)
        delta_square += square_sum(d_piece)
        inner += inner_product(v_piece, d_piece)
        right.addmm_(v_piece.T, probes[rows])
    seen = torch.zeros(probes.shape[1], probes.shape[1], dtype=torch.float64, device=device)
    side = min(v.rows, v.columns)
    step = panel_width(max(v.rows, v.columns))
    for first in range(0, side, step):
        part = slice(first, min(first + step, side))
        width = part.stop - part.start
        if tall:  # T = VᵀΔ by columns, and VᵀV
            t = torch.zeros(v.columns, width, dtype=v.dtype, device=device)
            vtv = torch.zeros(v.columns, width if null else 0, dtype=v.dtype, device=device)
            for (_, v_piece), (_, d_piece) in zip(v, delta, strict=True):
                t.addmm_(v_piece.T, d_piece[:, part])
                if null:
                    vtv.addmm_(v_piece.T, v_piece[:, part])
            overlap += square_sum(t)
            gram += square_sum(vtv)
            for _, v_piece in v:
                image += square_sum(v_piece @ t)
                if not null and not first:
                    found = (v_piece @ right).double()
                    seen.addmm_(found.T, found)
        else:  # wide: rows of S = VVᵀ, then SΔ
            s = torch.zeros(width, v.rows, dtype=v.dtype, device=device)
            panels = [slice(c, min(c + step, v.columns)) for c in range(0, v.columns, step)]
            for columns in panels:
                piece = v.panel(columns)
                s.addmm_(piece[part], piece.T)
            gram += square_sum(s)
            for columns in panels:
                piece = delta.panel(columns)
                projected = s @ piece
                image += square_sum(projected)
                overlap += float((projected * piece[part]).sum(dim=-1).double().sum())
    moments = Moments(
        overlap, image, delta_square, v_square, gram, d_out=v.rows, inner=inner, numel=v.rows * v.columns,
        delta_gram=pair_moment(products.cpu().numpy()),
    )  # fmt: skip
    if null or not tall or not v_square or not math.isfinite(v_square):
        return moments
    gram, error = null_moment((right.T.double() @ right.double()).cpu().numpy(), seen.cpu().numpy(), NULL_SAMPLES[True])
    return with_null(replace(moments, gram=gram), v.columns, error)
