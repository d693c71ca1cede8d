"""`mask`: the elements that score files choose are replaced by the safety or the aligned weight, or by 0.

`safemerge score` writes score files; masks and scores made elsewhere will do too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Kernel, Pieces
from safemerge_recipes.methods.top import Top, chooser
from safemerge_recipes.methods.work import Apply
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.fields import Strict, Text
from safemerge_recipes.recipe.mask_files import COMBINED
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.recipe.numbers import Rational
from safemerge_recipes.sources.masks import mask_ref
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.algebra import Stored, Weight, total

if TYPE_CHECKING:
    import torch


class ScoreFile(Strict):
    """A score or mask of every element, and which elements it chooses."""

    path: Text
    """A safetensors file with a tensor of the same name and shape for every merged tensor; `safemerge score`
    writes such files."""
    threshold: float | None = None
    """Elements with a value above it are chosen. Without `threshold` and `top` the file holds 0 (keep) to 1
    (replace); values in between mix."""
    top: float | None = Field(default=None, gt=0, le=1)
    """The part of the elements that is chosen, those with the highest scores: ⌊top·n⌋ of n, ties by position."""
    per: Literal["tensor", "row", "column"] = "tensor"
    """Among which elements `top` ranks: the whole tensor's, each row's or each column's, as it is stored."""

    @model_validator(mode="after")
    def _one_way(self) -> ScoreFile:
        if self.top is not None and self.threshold is not None:
            raise ValueError("found threshold and top; expected one of them")
        if "per" in self.model_fields_set and self.per != "tensor" and self.top is None:
            raise ValueError("found `per` without `top`; expected it only beside `top`")
        return self


class MaskFile(ScoreFile):
    """The elements to replace, and what replaces them."""

    minus: ScoreFile | None = None
    """Chosen elements that this file chooses too are left out: harmful minus utility."""
    and_: ScoreFile | None = Field(default=None, alias="and")
    """Only elements that this file chooses too are replaced."""
    or_: ScoreFile | None = Field(default=None, alias="or")
    """Elements that this file chooses are replaced as well."""
    invert: bool = False
    """Replace the other elements instead."""
    fill: Literal["safety", "aligned", "zero"] = "safety"
    """What replaced elements become: the safety or the aligned weight, or 0; with `merge.weights` the aligned weight
    and Σ weight·Δ."""

    @model_validator(mode="after")
    def _one_combination(self) -> MaskFile:
        given = [key for key, file in self.combined() if file is not None]
        if len(given) > 1:
            raise ValueError(f"found {' and '.join(f'`{key}`' for key in given)}; expected at most one of them")
        return self

    def combined(self) -> tuple[tuple[str, ScoreFile | None], ...]:
        """Each way to combine two files, and the other file where it is given."""
        return tuple(zip(COMBINED, (self.minus, self.and_, self.or_), strict=True))

    def files(self) -> tuple[tuple[str, ScoreFile], ...]:
        """(how it is combined with those before, score file): its own first."""
        return (("", self), *((key, file) for key, file in self.combined() if file is not None))


class Mask(Weighted):
    """Elements chosen by score files are replaced."""

    short: ClassVar[tuple[str, ...]] = ()
    method: Literal["mask"]
    mask: MaskFile
    """The elements to replace (`mask`)."""

    def needs(self) -> tuple[Role, ...]:
        """What fills the elements."""
        if self.weights is not None:
            return super().needs()
        return ("safety",) if self.mask.fill == "safety" else ()

    @model_validator(mode="after")
    def _one_fill(self) -> Mask:
        if self.weights is not None and "fill" in self.mask.model_fields_set:
            raise ValueError("found weights and mask.fill; expected one of them")
        return self

    def shares(self) -> dict[Role, Rational]:
        """What each delta weighs in what replaces elements; none without weights."""
        return super().shares() if self.weights is not None else {}

    @property
    def mask_files(self) -> tuple[str, ...]:
        """The paths of its score files."""
        return tuple(file.path for _, file in self.mask.files())


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one score file chooses: all above `threshold`, what is on `top`, or, with neither, its own shares."""

    threshold: float | None
    top: Top | None


@dataclass(frozen=True, slots=True)
class Masked(Kernel):
    """Elements of x are replaced by y's where the score files choose them.

    A file without threshold and top holds shares from 0 (keep) to 1 (replace), and in between mixes: (1−m)·x + m·y,
    exact at both ends. Two files combine as m·(1−o), m·o or m+o−m·o, which for choices are minus, and, or. `invert`
    takes 1 − m.
    """

    chosen: tuple[Chosen, ...]
    how: str
    invert: bool

    @property
    def whole_rows(self) -> bool:
        """Whether a file ranks within rows or columns."""
        return any(one.top is not None and one.top.per != "tensor" for one in self.chosen)

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> tuple[str, list[Any]]:
        """(name, what chooses in each file's pieces), from as many passes over the scores as ranks take."""
        return name, [
            None if one.top is None else chooser(one.top, name, numel, _side(pieces, 2 + number), arena)
            for number, one in enumerate(self.chosen)
        ]

    def held(self, numel: int, piece: int) -> int:
        """What ranks take."""
        return max((one.top.held(numel, piece) for one in self.chosen if one.top is not None), default=0)

    def apply(
        self, state: tuple[str, list[Any]], start: int, x: torch.Tensor, y: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        """The piece with what is masked replaced.

        Raises:
            SourceError: scores are NaN or, as shares, outside 0 to 1.
        """
        import torch

        *scores, _arena = rest
        name, choosers = state
        found = [
            _chosen(name, one, choose, start, score)
            for one, choose, score in zip(self.chosen, choosers, scores, strict=True)
        ]
        share = found[0]
        if len(found) > 1:
            share = combined(self.how, share, found[1])
        if share.dtype == torch.bool:
            return torch.where(~share if self.invert else share, y, x)
        return torch.lerp(x, y, share.neg_().add_(1) if self.invert else share, out=x)


def _side(pieces: Pieces, place: int) -> Pieces:
    """Passes over one of the inputs."""

    def passes(every: int = 1) -> Any:
        for start, *inputs in pieces(every=every):
            yield start, inputs[place]

    return passes


def _chosen(name: str, one: Chosen, choose: Any, start: int, score: torch.Tensor) -> torch.Tensor:
    """A bool tensor of what is chosen, or shares in the scores' dtype."""
    if one.top is not None or one.threshold is not None:
        if bool(score.isnan().any()):
            raise SourceError(f"{name}: the mask holds NaN; expected a score for every element")
        if one.threshold is not None:
            return score > one.threshold
        chosen: torch.Tensor = choose(start, score)
        return chosen
    low, high = (float(end) for end in score.aminmax())
    if not (low >= 0 and high <= 1):
        raise SourceError(
            f"{name}: the mask holds values from {low:g} to {high:g}; expected 0 (keep) to 1 (replace), "
            "or for scores a merge.mask.threshold or merge.mask.top"
        )
    return score


def combined(how: str, m: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What two files choose together, as `Masked` has it: choices or shares."""
    import torch

    if m.dtype == other.dtype == torch.bool:
        return m & ~other if how == "minus" else m & other if how == "and" else m | other
    wide = other.dtype if m.dtype == torch.bool else m.dtype
    m, other = m.to(wide), other.to(wide)
    if how == "or":
        return m + other - m * other
    return m * (1 - other) if how == "minus" else m * other


def work(merge: Mask, sides: Sides) -> Apply:
    """W_f with what is masked replaced."""
    files = merge.mask.files()
    refs = [mask_ref(sides.masks, file.path, sides.name, sides.shape) for _, file in files]
    fills: Mapping[str, Callable[[], Weight]] = {
        "safety": lambda: sides.need("safety"),
        "aligned": lambda: sides.aligned,
        "zero": Weight,
    }
    columns = sides.shape[-1] if sides.shape else 1
    chosen = tuple(
        Chosen(file.threshold, None if file.top is None else Top(file.top, file.per, columns)) for _, file in files
    )
    if merge.weights is not None:
        _, deltas = sides.weighed(merge.shares(), "delta")
        fill = sides.aligned + total(merge.shares().values(), deltas)
    else:
        fill = fills[merge.mask.fill]()
    inputs = (sides.finetuned, fill, *(Weight.of(Stored(ref)) for ref in refs))
    return Apply(Weight(), inputs, Masked(chosen, files[-1][0], merge.mask.invert))


MASK = Method(work, keys=Mask, formula="Δf, with the elements that score files choose replaced")
