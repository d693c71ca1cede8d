"""Score files: a value for every element of the gated tensors, which `merge.mask` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.api.given import loaded_of, resources_of
from safemerge_recipes.errors import RecipeError
from safemerge_recipes.events import Listener, ignore

if TYPE_CHECKING:
    from safemerge_recipes.api.given import RecipeLike


def score(
    recipe: RecipeLike,
    by: str,
    *,
    of: str = "finetuned",
    prompts: Sequence[str | Path] = (),
    tokens: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_length: int = 1024,
    output: str | Path | None = None,
    device: str = "auto",
    max_memory: str | int = "2GB",
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Writes a score for every element of the tensors that a recipe's gate may pick.

    Args:
        recipe: the recipe; its merge is not looked at.
        by: `magnitude`, `drift`, `opposed`, `wanda`, `snip`, `fisher` or `safe-delta`.
        of: the source that is scored.
        prompts: files of rows (JSONL) or of lines (.txt), for scores that look at activations.
        tokens: which tokens count: `all` or `answer`; by default as the kind of score has it.
        limit: only so many prompts, drawn by `seed`.
        seed: of that draw.
        max_length: longer prompts are cut to so many tokens.
        output: the file; by default BY.safetensors beside the recipe.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        max_memory: own memory, in bytes or as a text such as `2GB`.
        on_event: is told what goes on.

    Returns:
        What the file says of itself: how it was made and from what; `path` is the file.

    Raises:
        SafemergeError: it cannot be made; nothing is left at the file's place.
    """
    from safemerge_recipes.scores.kinds import KINDS
    from safemerge_recipes.scores.prompts import Asked
    from safemerge_recipes.scores.run import write_scores
    from safemerge_recipes.scores.score_file import check_target
    from safemerge_recipes.scores.subject import subject_of

    if tokens not in (None, "all", "answer"):
        raise RecipeError(f"--tokens {tokens}: expected all or answer")
    loaded = loaded_of(recipe)
    subject = subject_of(loaded, by, of)
    asked = None
    if prompts:
        files = tuple(Path(file) for file in prompts)
        asked = Asked(files, tokens or KINDS[by].tokens, limit, seed, max_length)  # type: ignore[arg-type]  # checked
    path = Path.cwd() / output if output else loaded.directory / f"{by}.safetensors"
    check_target(path)
    about = write_scores(subject, asked, path, resources_of(device, 1, max_memory), on_event)
    return {"path": str(path), **about}
