"""What the layers of a block are given on the prompts, summed by hooks, and the scores that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import CheckError
from safemerge_recipes.scores.prompts import Example
from safemerge_recipes.scores.skeleton import Skeleton, whole
from safemerge_recipes.scores.subject import Subject

if TYPE_CHECKING:
    import torch

DAMPING = 0.01
"""What H gets of its mean diagonal, as in the published code."""


class Inputs:
    """Sums over the inputs of a block's scored layers, taken by hooks: ‖X_j‖² or XᵀX, in float64."""

    def __init__(self, subject: Subject, skeleton: Skeleton, scored: Sequence[str], used: Sequence[Example]) -> None:
        self.subject, self.skeleton, self.scored, self.used = subject, skeleton, scored, used
        self.sums: dict[str, torch.Tensor] = {}
        self._seen: dict[str, int] = {}

    def __enter__(self) -> Inputs:
        self._hooks = [
            self.skeleton.places[name][0].register_forward_pre_hook(self._hook(name)) for name in self.scored
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        width = self._width(name)

        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            number = self._seen[name] = self._seen.get(name, -1) + 1
            x = inputs[0] if inputs else None
            if x is None or x.shape[-1] != width or number >= len(self.used):
                raise CheckError(f"{name}: is not used as the matrix of a linear layer, so its inputs cannot be seen")
            example = self.used[number]
            if example.first and (x.dim() < 2 or x.shape[-2] != len(example.ids)):
                raise CheckError(f"{name}: does not see every token; expected --tokens all")
            if example.first:
                x = x[..., example.first :, :]
            x = x.reshape(-1, width)
            own = (x.double() ** 2).sum(0) if self.subject.kind.sees == "norms" else (x.T @ x).double()
            if not bool(own.isfinite().all()):
                raise CheckError(f"{name}: its inputs are not finite on {example.where}; expected finite activations")
            self.sums[name] = self.sums[name].add_(own) if name in self.sums else own

        return hook

    def _turned(self, name: str) -> bool:
        return name in self.subject.family.input_first

    def _width(self, name: str) -> int:
        return self.subject.shape(name)[0 if self._turned(name) else -1]

    def scores(self, name: str) -> torch.Tensor:
        """The scores of a tensor, in its shape.

        Raises:
            CheckError: no prompt reached it.
        """
        if name not in self.sums:
            raise CheckError(f"{name}: no prompt reached it; expected more prompts, or a gate.scope without it")
        sums = self.sums.pop(name)
        weight = whole(self.subject.weight(name), self.subject.shape(name), self.skeleton.reader, self.skeleton.device)
        if self.subject.kind.sees == "norms":
            factor, scores = sums.sqrt().float(), weight.abs_()
        else:
            factor, scores = (0.5 / inverse_diagonal(sums * (2 / len(self.used)))).float(), weight.square_()
        return scores * (factor[:, None] if self._turned(name) else factor)


def inverse_diagonal(h: torch.Tensor) -> torch.Tensor:
    """The diagonal of the inverse of H `(d, d)`, float64: unused columns get 1, then all the damping."""
    import torch

    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky(h)).diagonal()
    return inverse
