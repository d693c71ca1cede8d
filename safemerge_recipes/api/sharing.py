"""Recipes that are written for the user: from mergekit files, from models, and those that are shipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safemerge_recipes.errors import PlanError, RecipeError


def import_mergekit(path: str | Path, output: str | Path | None = None, *, like: str | Path | None = None) -> str:
    """A mergekit file as a recipe with the same tensors, as YAML text; also written to `output`, if given.

    Args:
        path: the file for mergekit-yaml.
        output: where the recipe goes; its relative paths start there, else at the current folder.
        like: a local model with the same tensors, where the models themselves are not here and settings differ
            between tensors.

    Raises:
        RecipeError: with everything that has no counterpart, a line each, or the file exists already.
    """
    from safemerge_recipes.sharing.mergekit.importing import import_mergekit as made

    return _written(made(Path(path), _folder_of(output), None if like is None else Path(like)), output)


def first_recipe(
    places: Sequence[str],
    output: str | Path | None = None,
    *,
    given: Mapping[str, str] | None = None,
    ask: Callable[[str, str, str], str] | None = None,
) -> str:
    """A first recipe with comments, as YAML text; also written to `output`, if given.

    Args:
        places: the folder or hub id of an adapter, of a fine-tuned model, of an aligned and a fine-tuned model, or the
            name of a family, such as `llama-3.1-8b`.
        output: where the recipe goes; its relative paths start there, else at the current folder.
        given: places by role, `base`, `aligned`, `safety`, and the `name` of the result.
        ask: (role, question, what is known) -> the answer; asked for every role.

    Raises:
        RecipeError: something that it needs is not known, a place is not understood, or the file exists already.
    """
    from dataclasses import replace

    from safemerge_recipes.sharing import starting

    if not 1 <= len(places) <= 2:
        raise RecipeError(
            f"init: found {len(places)} places; expected an adapter, a model, an aligned and a fine-tuned model, or a "
            f"family: {', '.join(starting.FAMILIES)}"
        )
    start = starting.look(places[-1])
    known = {key: value for key, value in (given or {}).items() if value}
    if len(places) == 2:
        known.setdefault("aligned", places[0])
    start = starting.with_base(replace(start, **known))
    for role, question in starting.QUESTIONS.items() if ask else ():
        answer = ask(role, question, getattr(start, role)) if ask else ""
        start = starting.with_base(replace(start, **{role: answer.strip()}))
    return _written(starting.write_start(start, _folder_of(output)), output)


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: by name where each comes from. `safemerge:NAME` is a place of one."""
    from safemerge_recipes.sharing.shipped import shipped, shipped_text, what_it_is

    return {name: what_it_is(shipped_text(name)) for name in shipped()}


def shipped_recipe(name: str, output: str | Path | None = None) -> str:
    """The text of a recipe that comes with the package; also written to `output`, if given.

    Raises:
        RecipeError: there is none of that name, or the file exists already.
    """
    from safemerge_recipes.sharing.shipped import shipped_text

    return _written(shipped_text(name), output)


def mergekit_yaml(arguments: list[str]) -> None:
    """Runs mergekit-yaml with the method `safemerge` registered.

    Args:
        arguments: those of mergekit-yaml: the file, the folder to write, and options.

    Raises:
        PlanError: mergekit is not installed, or says that it cannot be done.
        RecipeError: mergekit refuses the file or an option.
    """
    try:
        from safemerge_recipes.sharing.mergekit.method import run
    except ImportError:
        raise PlanError("mergekit is not installed; try: pip install 'safemerge-recipes[mergekit]'") from None
    run(arguments)


def _folder_of(output: str | Path | None) -> Path:
    """The folder that a recipe's relative paths start from."""
    return Path.cwd() if output is None else (Path.cwd() / output).parent


def _written(text: str, output: str | Path | None) -> str:
    """A recipe's text, written to a new file if one is given. Raises RecipeError where that exists."""
    from safemerge_recipes.storage.files import write_file

    if output is not None:
        path = Path(output)
        if path.exists():
            raise RecipeError(f"--output {path}: is there already; expected a new file, choose another name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"--output {path}: {error.strerror}; expected a folder that can be made") from None
        write_file(path, text)
    return text
