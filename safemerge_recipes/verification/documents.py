"""An output's report and card against what plan, scores, recipe and manifest make them now."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safemerge_recipes.engine.documents import rendered, scores_in
from safemerge_recipes.engine.manifest import Manifest, manifest_record, versions
from safemerge_recipes.verification.problems import refuse


def unfinished(manifest: Manifest) -> bool:
    """Whether files of an output are being replaced, or a command that replaced them was cut short."""
    return any(stamp.next is not None or stamp.new for stamp in manifest.outputs.values())


def check_documents(folder: Path, manifest: Manifest) -> str:
    """Compares report and card with what is rendered anew; says why not, where it cannot.

    Raises:
        CheckError: one is not what plan, scores, recipe and manifest make it.
    """
    own, version = manifest_record(folder), versions()["safemerge-recipes"]
    written = str(own.get("rendered") or own.get("versions", {}).get("safemerge-recipes"))
    if written != version:
        return f"report and card: rendered by version {written[:40]}, this is {version}"
    if unfinished(manifest):
        return "report and card: a command that replaces them was cut short, `safemerge report` ends it"
    now = rendered(folder, scores_in(folder))
    stamps = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in now.items()}
    refuse(
        folder,
        [
            f"{name}: is not what plan, scores, recipe and manifest make it when rendered again"
            for name, sha256 in stamps.items()
            if name not in manifest.outputs or manifest.outputs[name].sha256 != sha256
        ],
    )
    return ""
