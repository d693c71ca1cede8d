"""The method's arithmetic, in blocks and whole."""

from __future__ import annotations

import pytest
import torch
from safemerge_example_method import CLIP, Clip

from safemerge_recipes.plugins import Arena, Merge, RecipeError, Sides, Weight


def test_clips_at_a_multiple_of_the_root_mean_square():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    bound = 1.5 * float(x.double().square().mean().sqrt())
    kernel, arena = Clip(1.5), Arena()

    def blocks():
        return ((first, x[first : first + 300].clone()) for first in range(0, 1000, 300))

    state = kernel.scan("x", 1000, blocks, arena)
    assert state == pytest.approx(bound)
    merged = torch.cat([kernel.apply(state, first, block, arena) for first, block in blocks()])
    assert torch.equal(merged, x.clamp(-state, state))
    assert 0 < int((merged != x).sum()) < 500


@pytest.mark.parametrize("limit", [None, 0, -1, "much", True])
def test_a_limit_that_means_nothing_is_refused(limit):
    merge = Merge.model_validate({"method": "clip", "options": {"limit": limit}})
    sides = Sides("x", (2, 2), {"aligned": Weight(), "finetuned": Weight()})
    with pytest.raises(RecipeError, match=r"merge\.options\.limit"):
        CLIP.work(merge, sides)
