"""What lies beside the weights of an output: plan, recipe, report, card, side files, and the manifest last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_recipes.engine.folder import (
    MANIFEST_FILE,
    MAX_PICTURE_BYTES,
    PICTURES,
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SCORES_FILE,
)
from safemerge_recipes.engine.manifest import make_manifest, manifest_record, read_record, versions, write_manifest
from safemerge_recipes.errors import CheckError, SourceError
from safemerge_recipes.planning.graph import ENGINE
from safemerge_recipes.planning.prepared import Prepared, recipe_json
from safemerge_recipes.recipe.mask_files import mask_holders
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.recipe.source import source_holders
from safemerge_recipes.recipe.writing import dump_recipe
from safemerge_recipes.sources.masks import mask_path
from safemerge_recipes.sources.mirror import origin_url
from safemerge_recipes.sources.provenance import origin, pipeline_tag, portable, sources_of
from safemerge_recipes.sources.side_files import copy_side_files, only_tokenizer
from safemerge_recipes.storage.digests import InputDigest
from safemerge_recipes.storage.files import MAX_BYTES, text_of, write_file, write_json
from safemerge_recipes.storage.identity import check_unchanged


def write_documents(
    prepared: Prepared,
    part: Path,
    output: Path | str,
    plan: dict[str, Any],
    inputs: Mapping[str, InputDigest],
    files: Mapping[str, str],
    tensors: dict[str, tuple[str, str | None]],
    timings: Mapping[str, float],
    away: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Writes everything that lies beside the weights, the manifest last; returns the timings of all phases.

    `output` is where it is going; `away` has the bytes of weight files that are there already and not in `part`.
    """
    write_json(part / PLAN_FILE, plan)
    recipe = _stored_recipe(prepared, output)
    write_file(part / RECIPE_FILE, recipe)
    check_unchanged(prepared.identities)
    copy_side_files(beside_of(prepared), part, prepared.side_edits)
    timings = {**prepared.timings, **timings}
    provenance = provenance_of(prepared)
    provenance["recipe"] = portable(recipe, provenance["sources"])
    for name, text in documents(plan, None, provenance, part).items():
        write_file(part / name, text)
    labels: dict[str, tuple[list[str], str]] = {}
    for role, model in prepared.family.models.items():
        for file in model.files:
            labels.setdefault(file, ([], origin(model.folder)[0]))[0].append(role)
    for file in prepared.family.mask_files:
        labels.setdefault(file, ([], Path(file).name))[0].append("mask")
    manifest = make_manifest(
        engine=ENGINE, workers=prepared.resources.workers, identities=prepared.identities, labels=labels,
        inputs=inputs, folder=part, sealed=files, timings=timings, tensors=tensors, away=away or {},
    )  # fmt: skip
    write_manifest(part, manifest | {key: provenance[key] for key in ("sources", "pipeline_tag")})
    return timings


def provenance_of(prepared: Prepared) -> dict[str, Any]:
    """What report and card say of the sources and versions. Holds no local path."""
    family = prepared.family
    sources = sources_of(family, prepared.resolved.loaded.directory)
    return {
        "sources": sources,
        "pipeline_tag": pipeline_tag(family.models["aligned"].checkpoint.config),
        "versions": versions(),
        "recipe": portable(dump_recipe(prepared.recipe), sources),
    }


def documents(
    plan: dict[str, Any], scores: dict[str, Any] | None, provenance: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Report and model card by file name, with the pictures of a sweep or a probe that lie in the folder."""
    from safemerge_recipes.report.card import render_card
    from safemerge_recipes.report.page import render_report

    drawn = ((title, folder / name) for title, name in PICTURES.items())
    try:
        pictures = {title: text_of(path, MAX_PICTURE_BYTES) for title, path in drawn if path.exists()}
    except UnicodeDecodeError:
        raise CheckError(f"{folder}: holds a picture that is no text; expected that of a sweep or probe") from None
    return {
        REPORT_FILE: render_report(plan, scores=scores, provenance=provenance, pictures=pictures),
        "README.md": render_card(plan, scores=scores, provenance=provenance),
    }


def provenance_in(folder: Path) -> dict[str, Any]:
    """What report and card say of sources and versions, from a finished output alone.

    Raises:
        CheckError: The folder is no finished output.
    """
    try:
        manifest = manifest_record(folder)
        text = text_of(folder / RECIPE_FILE, MAX_BYTES)
        known = {key: manifest[key] for key in ("sources", "pipeline_tag")}
        return {**known, "versions": manifest["versions"], "recipe": portable(text, known["sources"])}
    except (OSError, SourceError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckError(
            f"{folder}: no finished output of safemerge ({type(error).__name__}: {error}); expected {MANIFEST_FILE}, "
            f"{PLAN_FILE} and {RECIPE_FILE} there"
        ) from None


def scores_in(folder: Path) -> dict[str, Any] | None:
    """The content of an output's scores file; None without one. Raises CheckError for one that is none."""
    return read_record(folder / SCORES_FILE) if (folder / SCORES_FILE).exists() else None


def rendered(folder: Path, scores: dict[str, Any] | None) -> dict[str, str]:
    """Report and model card of a finished output by file name: what lies in it decides every byte of them.

    Raises:
        CheckError: The folder is no finished output, or a picture in it is none.
    """
    try:
        return documents(read_record(folder / PLAN_FILE), scores, provenance_in(folder), folder)
    except SourceError as error:
        raise CheckError(str(error)) from None


def beside_of(prepared: Prepared) -> Mapping[str, Path]:
    """Relative name -> source of the files that lie beside the weights; of an adapter, the tokenizer alone."""
    files = {name: path for name, path in prepared.resolved.side_files.items() if name not in prepared.stale_files}
    return only_tokenizer(files) if prepared.recipe.output.format == "adapter" else files


def _stored_recipe(prepared: Prepared, output: Path | str) -> str:
    """The recipe as it lies in the output: local paths seen from there, hub ids pinned to their commit.

    From a URL no local path can be seen: of each its last name stays.
    """
    values = json.loads(recipe_json(prepared.recipe))
    for holder, role in source_holders(values["sources"]):
        source, model = holder[role], prepared.family.models[role]
        if isinstance(source, str):
            source = holder[role] = {"location": source}
        key = next(key for key in ("model", "adapter", "location") if source.get(key))
        if origin_url(model.folder.path) is not None:
            continue
        if model.folder.revision is not None:
            source["revision"] = model.folder.revision
        else:
            root = model.folder.path
            for _ in Path(source.get("subfolder") or "").parts:
                root = root.parent
            source[key] = _seen_from(output, root)
            if not source[key].startswith("."):
                source[key] = f"./{source[key]}"
    for part in (values, *values.get("rules", ())):
        for mask in mask_holders(part.get("merge")):
            mask["path"] = _seen_from(output, mask_path(prepared.resolved.loaded.directory, mask["path"]))
    values.get("output", {}).pop("path", None)
    return dump_recipe(Recipe.model_validate_json(json.dumps(values)))


def _seen_from(output: Path | str, path: Path) -> str:
    return f"./{path.name}" if isinstance(output, str) else os.path.relpath(path, output)
