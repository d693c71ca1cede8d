"""LoRA factors combined one by one, as PEFT's `linear` does: `space: factors` of `linear` and `dare_linear`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.base import Sides
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.weights.algebra import Blend, LowRank, Weight


def blend(shares: Mapping[Role, float], sides: Sides, draw: tuple[float, int, str] | None = None) -> Weight:
    """Δ as PEFT's `linear` combines adapters: (Σ√(wᵢsᵢ)Bᵢ)(Σ√(wᵢsᵢ)Aᵢ), with s the scale of an adapter.

    An adapter that lacks the module takes no part, as in PEFT (0.21, `add_weighted_adapter`). With the same A on
    both sides and weights 0.8 and 0.2 the deltas weigh 1.2 and 0.6: the square roots' cross terms.

    Raises:
        SourceError: a side is not one LoRA product, or the ranks differ.
    """
    parts: list[tuple[float, float, LowRank]] = []
    of: list[Role] = []
    for role, share in shares.items():
        delta = sides.need(role) - sides.aligned
        if delta.is_zero:
            continue
        coefficient, operand = delta.terms[0]
        if len(delta.terms) != 1 or not isinstance(operand, LowRank):
            raise SourceError(
                f"sources.{role}: {sides.name}: is not an adapter on the aligned model; "
                "merge.space: factors combines the factors of adapters, use space: delta for anything else"
            )
        weight = float(coefficient) * share * operand.scale
        root = math.sqrt(abs(weight))
        parts.append((root, math.copysign(root, weight), operand))
        of.append(role)
    ranks = [part[2].rank for part in parts]
    if len(set(ranks)) > 1 or len({part[2].transposed for part in parts}) > 1:
        other = next(place for place, rank in enumerate(ranks) if rank != ranks[0] or place == len(ranks) - 1)
        first = "the fine-tuned adapter" if of[0] == "finetuned" else of[0]
        raise SourceError(
            f"sources.{of[other]}: {sides.name}: has rank {ranks[other]}, {first} {ranks[0]}; "
            "merge.space: factors needs equal ranks, use space: delta"
        )
    return Weight.of(Blend(tuple(parts), draw)) if parts else Weight()
