"""`safemerge import`: a mergekit file becomes a recipe with the same tensors.

Roles: a base that deltas are taken from is `aligned`, the first other model `finetuned`, the second `safety`, further
ones stand under `others`; without a base, the first model is both `aligned` and `finetuned`. The gate takes every
tensor, vectors too. Settings that differ between tensors become rules; for those the names of the tensors are read from
the models' headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import RecipeError, SafemergeError
from safemerge_recipes.recipe.loading import parse_recipe
from safemerge_recipes.recipe.source import split_revision
from safemerge_recipes.recipe.yaml_text import Keys, write_yaml
from safemerge_recipes.sharing.mergekit.methods import MAX_INPUTS, NATIVE, Native, called, role_of
from safemerge_recipes.sharing.mergekit.reading import Input, MergeFile, Segment, read_file
from safemerge_recipes.sharing.mergekit.settings import filters, grouped, is_plain, patterns, place_of, values_of
from safemerge_recipes.sharing.templates import EDITOR_LINE, shown_place
from safemerge_recipes.sources.checkpoint import named_files, open_checkpoint
from safemerge_recipes.sources.hub import head, open_repository
from safemerge_recipes.storage.layout import INDEX_FILE, SINGLE_FILE
from safemerge_recipes.tensor_names import block_index

Merge = dict[str, Any]


def import_mergekit(path: Path, folder: Path, like: Path | None = None) -> str:
    """The recipe, as YAML text.

    Args:
        path: the mergekit file; relative paths in it start at the current folder, as mergekit has them.
        folder: where the recipe will lie, whose relative paths start there.
        like: a local model with the same tensors, where the models themselves are not here.

    Raises:
        RecipeError: with everything that has no counterpart, a line each.
    """
    file = read_file(path)
    file.check()
    native = NATIVE.get(file.method)
    try:
        method = native or called(file.method)  # with as many inputs as there are, below
    except RecipeError as error:
        raise RecipeError(f"{file.label}:{file.line(('merge_method',))} {error}") from None
    inputs = _order(file, method)
    file.check()
    if native is None:
        method = called(file.method, len(inputs) - 1)
    merge, rules = _merges(file, method, inputs, like)
    file.check()
    sources: dict[str, Any] = {}
    for role, one in inputs.items():
        if role != "safety" or any(_reads_safety(one) for one in (merge, *(rule["merge"] for rule in rules))):
            holder = sources if role in ("aligned", "finetuned", "safety") else sources.setdefault("others", {})
            holder[role] = _source(file, one, inputs["aligned"], folder)
    file.check()
    recipe: dict[str, Any] = {
        "name": path.stem, "sources": sources, "gate": {"names": "*", "scope": "*"}, "merge": merge,
        **({"rules": rules} if rules else {}),
        "output": {"path": f"out/{path.stem}", **({"dtype": file.dtype} if file.dtype else {})},
    }  # fmt: skip
    text = f"{_head(file, path, merge, rules)}{write_yaml(recipe)}"
    parse_recipe(text, folder / f"{path.stem}.yaml")
    return text


def _head(file: MergeFile, path: Path, merge: Merge, rules: list[dict[str, Any]]) -> str:
    """The comment above the recipe: where it comes from, and what is to be known of it."""
    used = {one["method"] for one in (merge, *(rule["merge"] for rule in rules)) if "method" in one}
    lines = [EDITOR_LINE, f"# Made from {path.name}, a mergekit file ({file.method}), by `safemerge import`."]
    lines.append("# Every tensor is merged. Arithmetic is float32 or better and rounds once, whatever `dtype` was.")
    if any("dare" in one for one in used):
        lines.append("# DARE draws at random: the elements that are dropped are others than mergekit would draw.")
    if any(one.startswith("mergekit:") for one in used):
        lines.append("# Methods called mergekit:… are computed by mergekit: pip install 'safemerge-recipes[mergekit]'.")
    lines += [f"# Not taken over: {note}." for note in file.notes]
    return "".join(f"{line}\n" for line in lines)


def _order(file: MergeFile, method: Native) -> dict[str, Input]:
    """The inputs by role."""
    listed = list(file.segments[0].inputs)
    if method.kind == "free":
        if file.base is not None and file.base.model not in [one.model for one in listed] and file.method == "linear":
            listed.append(file.base)
        if file.base is not None and file.method not in NATIVE:
            file.problems.append((("base_model",), f"changes what {file.method} does; a recipe has no such form of it"))
        first = listed[0]
        others = listed
    else:
        if file.base is None:
            file.problems.append((("merge_method",), f"{file.method} needs base_model, which is missing"))
            return {}
        first = file.base
        others = [one for one in listed if one.model != file.base.model]
        if method.kind == "pair":
            others = [file.base, *others]
    least = 2 if method.kind == "pair" else 1
    most = 2 if method.kind == "pair" else MAX_INPUTS
    for one in others[most:]:
        message = f"a further model; expected at most {most} for {file.method}"
        file.problems.append((one.keys[:-1] or one.keys, message))
    if file.method == "passthrough" and len(others) > 1:
        file.problems.append((others[1].keys[:-1], "a second model; expected one for passthrough"))
    if len(others) < least:
        file.problems.append((file.segments[0].keys, f"found {len(others)} models; expected {least} for {file.method}"))
        return {}
    named = {role_of(place): one for place, one in enumerate(others)}
    return {"aligned": first, "finetuned": others[0], "safety": first} | named


def _merges(
    file: MergeFile, method: Native, inputs: Mapping[str, Input], like: Path | None
) -> tuple[Merge, list[dict[str, Any]]]:
    """The merge of most tensors, and rules for the others."""
    if is_plain(file):
        return _merge(file, method, inputs, file.segments[0], "", 0.0), []
    names = _names(file, inputs, like)
    blocks = max((index + 1 for name in names if (index := block_index(name)) is not None), default=0)
    if (last := file.segments[-1].last) is not None and last != blocks:
        place = (*file.segments[-1].keys, "sources", 0, "layer_range")
        file.problems.append((place, f"ends at {last}, the model has {blocks} blocks; a recipe leaves none out"))
        file.check()
    found = {}
    for name in names:
        segment, at = place_of(file, name, blocks)
        found[name] = _merge(file, method, inputs, segment, name, at)
    file.check()
    (merge, _), *others = grouped(found)
    asked = filters(file)
    rules = [{"tensors": patterns(listed, names, asked), "merge": _changed(one, merge)} for one, listed in others]
    return merge, rules


def _changed(one: Merge, merge: Merge) -> Merge:
    """What a rule has to say beside the recipe's merge."""
    if one["method"] != merge["method"] or set(merge) - set(one):
        return one
    return {key: value for key, value in one.items() if merge.get(key) != value}


def _merge(
    file: MergeFile, method: Native, inputs: Mapping[str, Input], segment: Segment, name: str, at: float
) -> Merge:
    """The `merge` of one tensor."""
    wanted = [one.model for role, one in inputs.items() if role != "aligned"]
    given = {one.model: one for one in segment.inputs}
    owners = [given.get(model, inputs["finetuned"]) for model in wanted]
    single = len(given) == 1 or (method.kind == "based" and len(set(given) - {inputs["aligned"].model}) == 1)
    if file.method == "passthrough" or (single and method.kind != "pair"):
        owners = owners[:1]
    for form in (method, called(file.method, len(owners))) if file.method in NATIVE else (method,):
        try:
            merge = form.merge(values_of(file, form.parameters, owners, name, segment, at))
        except LookupError as missing:
            keys, what = missing.args
            what = f"{what} is missing" + (f" for {name}" if name else "") + f"; expected it for {file.method}"
            file.problems.append((keys, what))
            file.check()
            raise
        except TypeError:
            file.problems.append((("parameters",), "found a value of another kind than the method takes"))
            file.check()
            raise
        if merge is not None:
            return merge
    raise AssertionError("what mergekit computes itself has a form")


def _names(file: MergeFile, inputs: Mapping[str, Input], like: Path | None) -> list[str]:
    """The names of the tensors, from the first model that can be read.

    Raises:
        RecipeError: none can.
    """
    reasons = []
    for place in [str(like)] if like else dict.fromkeys(one.place for one in inputs.values()):
        try:
            return _tensor_names(place)
        except SafemergeError as error:
            reasons.append(str(error))
    keys: Keys = ("parameters",) if "parameters" in file.document.value else file.segments[0].keys
    raise RecipeError(
        f"{file.label}:{file.line(keys)} {'.'.join(map(str, keys))}: differs between tensors, whose names are not "
        f"known here ({reasons[0]}); say --like FOLDER, a local model with the same tensors"
    )


def _tensor_names(place: str) -> list[str]:
    """The tensors of a model: of a folder, or on the hub from the headers alone."""
    if Path(place).expanduser().is_dir():
        return list(open_checkpoint(Path(place).expanduser()).tensors)
    name, revision = split_revision(place, None)
    repository = open_repository(name, revision, place, first=("config.json", INDEX_FILE))
    sharded = not repository.has(SINGLE_FILE) and (repository.path / INDEX_FILE).is_file()
    missing = repository.missing(named_files(repository.path) if sharded else [SINGLE_FILE])
    away = {file: head(repository, file) for file in missing if repository.files and repository.has(file)}
    return list(open_checkpoint(repository.path, away).tensors)


def _source(file: MergeFile, one: Input, aligned: Input, folder: Path) -> Any:
    """A source of the recipe: a place, or an adapter on the aligned model."""
    if one.adapter is None:
        return shown_place(one.place, folder)
    if one is aligned or one.place != aligned.place or aligned.adapter is not None:
        message = f"an adapter on {one.place}; a recipe's adapters lie on the model that deltas are taken from"
        file.problems.append((one.keys, message))
        return one.place
    return {"adapter": shown_place(one.adapter, folder)}


def _reads_safety(merge: Merge) -> bool:
    return merge.get("method", "drop") != "drop"
