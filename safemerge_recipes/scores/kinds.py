"""The kinds of scores by name: what each needs to see of a model, its formula and its source.

W is the weight of the scored model `(d_out, d_in)`, δ = W − W_aligned, X the inputs of its layer `(tokens, d_in)` on
the prompts, L the mean negative log-likelihood of the counted tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Sees = Literal["weights", "norms", "products", "gradients"]
"""What a score looks at: weights alone; norms of a layer's inputs; their products XᵀX; gradients."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of score.

    Attributes:
        formula: the score of an element.
        link: where it comes from.
        sees: what it looks at.
        opposed: whether it counts elements alone whose update has another sign than the safety model's.
        delta: whether it is a score of the update δ, which the aligned model has none of.
        aligned: whether it is the aligned model that runs on the prompts.
        tokens: which tokens count unless said.
    """

    formula: str
    link: str
    sees: Sees = "weights"
    delta: bool = False
    aligned: bool = False
    tokens: Literal["all", "answer"] = "all"
    opposed: bool = False


KINDS: Mapping[str, Kind] = {
    "magnitude": Kind("|W|", "https://arxiv.org/abs/1506.02626"),
    "drift": Kind("|δ|", "https://arxiv.org/abs/2306.01708", delta=True),
    "opposed": Kind(
        "|δ| where sign δ ≠ sign (W_safety − W_aligned), else 0", "https://arxiv.org/abs/2412.11041", delta=True,
        opposed=True,
    ),
    "wanda": Kind("|W|·‖X_j‖₂, column j", "https://arxiv.org/abs/2306.11695", "norms"),
    "snip": Kind(
        "the mean over prompts of |W ⊙ ∂L/∂W|", "https://arxiv.org/abs/2402.05162", "gradients", tokens="answer"
    ),
    "fisher": Kind(
        "the mean over prompts of (∂L/∂W)²", "https://arxiv.org/abs/2412.11041", "gradients", tokens="answer"
    ),
    "safe-delta": Kind(
        "δ²/(2·[H⁻¹]_jj), H = 2/N·XᵀX + 0.01·mean(diag)·I over N prompts, X of the aligned model",
        "https://arxiv.org/abs/2505.12038", "products", delta=True, aligned=True,
    ),
}  # fmt: skip
"""Every kind that `safemerge score --by` knows."""
