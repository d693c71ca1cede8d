"""A finished output, sent to the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes.api.checking import verify
from safemerge_recipes.errors import RecipeError
from safemerge_recipes.events import Listener, ignore


def publish(
    folder: str | Path,
    repository: str,
    *,
    branch: str | None = None,
    sources: Mapping[str, str] | Sequence[str] = (),
    private_key: str | Path | None = None,
    private: bool = False,
    answers: bool = False,
    upload: bool = False,
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Verifies a finished output and sends it to the hub; without `upload` it only says what would be sent.

    Args:
        folder: the output.
        repository: where it goes, `org/name`; made where it does not exist.
        branch: the branch it goes to; None: a pull request.
        sources: what a role that was a folder is on the hub, such as `{"safety": "org/safety-lora"}`, or
            `ROLE=org/name[@revision]` texts; its weights are compared with those that were merged.
        private_key: sign what is sent with this key (PEM, elliptic curve).
        private: whether a new repository is private.
        answers: send the answers to harmful requests, too.
        upload: send it.
        on_event: is told what goes on.

    Returns:
        `files` with `size` and whether they are `changed` against the output, `licences` by role, `notes`, and which
        files of an earlier model are `removed` from the repository. Without `upload` also what is `there`: of each
        file `new`, `changed`, `unchanged` or None where that is not known, and in words. With `upload` also
        `revision`, `commit`, `url` and `sent`.

    Raises:
        CheckError: the output is not sound.
        RecipeError: an argument is wrong.
        SourceError: a source on the hub is another than was merged.
        PlanError: something in it must not leave this machine, or the hub does not allow it.
        WriteError: broken off; the same call goes on.
    """
    from safemerge_recipes.report.licences import licence_note
    from safemerge_recipes.sharing.parcel import make_parcel, signed
    from safemerge_recipes.sharing.publish import look, send
    from safemerge_recipes.sources.hub import is_id

    folder = Path(folder)
    if not is_id(repository):
        raise RecipeError(f"--repo {repository[:100]}: expected org/name")
    pairs = sources.items() if isinstance(sources, Mapping) else [text.partition("=")[::2] for text in sources]
    verify(folder, on_event=on_event)
    parcel = make_parcel(folder, dict(pairs), answers=answers)
    if private_key is not None:
        parcel = signed(parcel, folder, Path(private_key))
    note = licence_note(parcel.sources)
    there = None if upload else look(parcel, repository, branch)
    states = there.states if there else {}
    told: dict[str, Any] = {
        "repository": repository,
        "files": [
            {"file": n, "size": parcel.size(n), "changed": n in parcel.changed, "there": states.get(n)}
            for n in parcel.files
        ],
        "licences": {role: source.get("license") for role, source in parcel.sources.items()},
        "notes": [*([note] if note else []), *parcel.notes],
    }
    if there is not None:
        told |= {"there": there.note, "removed": there.removed}
    if upload:
        title = f"{folder.name}, merged by safemerge-recipes"
        done = send(parcel, repository, branch, on_event, private=private, title=title)
        told |= {key: getattr(done, key) for key in ("revision", "commit", "url", "sent", "removed")}
    return told
