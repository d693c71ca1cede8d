"""`project_rows` (MSCP, arXiv 2508.09190): rows of the update or the weight that scores choose become their projection.

A row of a matrix `(d_out, d_in)` is a neuron's input weights; its score is the mean of its elements' scores. What is
projected on is what alignment changed, C ~ VVᵀ, as in `project`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Rows, Transform
from safemerge_recipes.methods.mask import MaskFile, combined
from safemerge_recipes.methods.products import zeros
from safemerge_recipes.methods.project import Normalization, Projection
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Prepare, Sum
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Space
from safemerge_recipes.recipe.numbers import exact
from safemerge_recipes.sources.masks import mask_ref
from safemerge_recipes.weights.algebra import Stored, Weight
from safemerge_recipes.weights.matrix import ROW_PIECE, TorchRows
from safemerge_recipes.weights.torch_factors import working_dtype

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.storage.arena import Arena
    from safemerge_recipes.storage.reader import Reader


class ProjectRows(Merge):
    """Chosen rows become their projection."""

    method: Literal["project_rows"]
    mask: MaskFile
    """The rows to project (`project_rows`): those with the highest mean scores (`top`), with a mean above `threshold`,
    or, with neither, a mean from 0 (keep) to 1 (project)."""
    normalize: Normalization = "frobenius"
    """What VVᵀ is divided by (`project_rows`), as for `project`."""
    space: Space = "delta"

    @property
    def mask_files(self) -> tuple[str, ...]:
        """The paths of its score files."""
        return tuple(file.path for _, file in self.mask.files())

    @model_validator(mode="after")
    def _whole_rows(self) -> ProjectRows:
        if self.mask.fill != "safety":
            raise ValueError("found mask.fill for method project_rows, which fills with the projection; expected none")
        if any(file.per != "tensor" for _, file in self.mask.files()):
            raise ValueError("found mask.per for method project_rows, which ranks a tensor's rows; expected none")
        return self


@dataclass(frozen=True, slots=True)
class RowChoice:
    """What one file chooses: all rows above `threshold`, the part `top`, or, with neither, its own shares."""

    threshold: float | None
    top: float | None

    def share(self, name: str, scores: Weight, tools: Tools) -> torch.Tensor:
        """How much of each row is projected, `(rows,)` float64 from 0 to 1: one pass over the scores.

        Raises:
            SourceError: scores are NaN or, as shares, outside 0 to 1.
        """
        import torch

        means = torch.cat([piece.double().mean(dim=1) for _, piece in TorchRows(scores, *_open(tools), "scores")])
        if bool(means.isnan().any()):
            raise SourceError(f"{name}: the mask holds NaN; expected a score for every element")
        if self.threshold is not None:
            return (means > self.threshold).double()
        if self.top is not None:
            best = means.argsort(descending=True, stable=True)[: int(exact(self.top) * len(means))]
            return torch.zeros_like(means).index_fill_(0, best, 1.0)
        if not (float(means.min()) >= 0 and float(means.max()) <= 1):
            raise SourceError(
                f"{name}: the mask's rows hold {float(means.min()):g} to {float(means.max()):g} in the mean; expected "
                "0 (keep) to 1 (project), or for scores a merge.mask.threshold or merge.mask.top"
            )
        return means


def _open(tools: Tools) -> tuple[Reader, Arena]:
    return tools.reader, tools.arena


@dataclass(frozen=True, slots=True)
class ProjectedRows(Transform):
    """(1 − m)·x + m·Cx row by row for inputs (V, x, scores…); m of two files and `invert` as for `mask`.

    Panels of rows in which nothing is chosen are not projected, so that few rows cost few products.
    """

    projection: Projection
    chosen: tuple[RowChoice, ...]
    how: str
    invert: bool
    matrices: ClassVar[str] = "oriented"

    def memory(self, inputs: tuple[Weight, ...], shape: tuple[int, ...]) -> int:
        """Bytes: those of the projection, pieces of rows, and a number for every row."""
        return self.projection.memory(inputs[:2], shape) + 3 * 8 * max(ROW_PIECE, shape[-1]) + 4 * 8 * shape[0]

    def prepare(self, name: str, inputs: tuple[Weight, ...], shape: tuple[int, ...], tools: Tools) -> Rows:
        """Rows of the mixture."""
        import torch

        v, x, *scores = inputs
        if x.is_zero:
            return zeros(shape, working_dtype(v), tools)
        share, *other = (one.share(name, file, tools) for one, file in zip(self.chosen, scores, strict=True))
        for one in other:
            share = combined(self.how, share, one)
        share = 1 - share if self.invert else share
        projected = self.projection.prepare(name, (v, x), shape, tools)
        own = TorchRows(x, *_open(tools), "own")

        def rows(first: int, last: int) -> torch.Tensor:
            kept, part = own.part(first, last), share[first:last, None]
            if not bool(part.any()):
                return kept
            return torch.lerp(kept, projected(first, last).to(kept.dtype), part.to(kept.dtype))

        return rows


def work(merge: ProjectRows, sides: Sides) -> Prepare | Sum:
    """W_a + the mixture of Δf, or that of W_f."""
    origin, (x,) = sides.weighed(("finetuned",), merge.space)
    if x.is_zero:
        return Sum(origin)
    files = merge.mask.files()
    refs = [mask_ref(sides.masks, file.path, sides.name, sides.shape) for _, file in files]
    chosen = tuple(RowChoice(file.threshold, file.top) for _, file in files)
    inputs = (sides.v, x, *(Weight.of(Stored(ref)) for ref in refs))
    transform = ProjectedRows(Projection(merge.normalize), chosen, files[-1][0], merge.mask.invert)
    return Prepare(origin, inputs, transform)


PROJECT_ROWS = Method(
    work,
    keys=ProjectRows,
    formula="Δf, with the rows that score files choose replaced by those of CΔf",
    needs=("base",),
    link="https://arxiv.org/abs/2508.09190",
)
