"""The output of a recipe: what is written, and where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from safemerge_recipes.recipe.fields import Size, Strict, Text


class Output(Strict):
    """What is written, and where."""

    path: Text | None = None
    """The folder to write. `--output` stands in for it."""
    format: Literal["full", "adapter"] = "full"
    """`full`: a complete checkpoint. `adapter`: a PEFT LoRA on the aligned model, exact where the merge is
    linear, else truncated to `rank` with the lost energy reported."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the written weights; null: that of each aligned tensor."""
    max_shard_size: Size = 5_000_000_000
    """Largest weight file, in bytes or as `5GB`, `500MB`, `2GiB`."""
    rank: int | None = Field(default=None, ge=1, le=65536)
    """Greatest rank of a written adapter; null: the exact rank, for methods that have one."""
    quantized: Literal["dequantize", "keep"] = "dequantize"
    """What becomes of a merged weight that the aligned model stores quantised: written in bfloat16 (or `dtype`), or
    quantised again in the same FP8 format, with fresh scales and the error in the report. Weights that nothing changes
    are copied with their scales either way."""
    allow_overflow: bool = False
    """Write values that `dtype` cannot hold as infinities, instead of stopping."""

    @model_validator(mode="after")
    def _check(self) -> Output:
        if self.rank is not None and self.format != "adapter":
            raise ValueError("found rank with format full; expected it only with format adapter")
        return self
