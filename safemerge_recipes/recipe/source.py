"""The sources of a recipe: which models and adapters are read, by role."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, model_validator

from safemerge_recipes.recipe.builtins import ROLES, Role
from safemerge_recipes.recipe.fields import Problems, Strict, Text, read_onto, tell_onto

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def split_revision(location: str, directory: Path | None) -> tuple[str, str | None]:
    """The location and revision of `id@revision`; a path keeps its `@`.

    A folder whose name looks like `id@revision` becomes `./id@revision`, which no reader
    takes for anything but a path.
    """
    name, at, revision = location.partition("@")
    if not at or not revision or not _HUB_ID.fullmatch(name):
        return location, None
    if directory is not None and (directory / location).exists():
        return f"./{location}", None
    return name, revision


class Source(Strict):
    """A model or an adapter: a local folder or a hub id. Plain text stands for `location`."""

    model_config = ConfigDict(json_schema_extra=tell_onto)

    model: Text | None = None
    """A checkpoint: local folder or hub id, or `id@revision`."""
    adapter: Text | None = None
    """A PEFT adapter: local folder or hub id, or `id@revision`."""
    location: Text | None = None
    """A checkpoint or an adapter, whichever is found there; the long form of plain text."""
    train: Text | None = None
    """A training file, whose adapter is found in the cache; `safemerge train-adapter` makes it. Only for `safety`
    and `finetuned`."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    subfolder: Text | None = None
    """Folder inside the source that holds the weights."""
    on: Literal["aligned", "base"] = "aligned"
    """The role that the adapter applies to."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            value = {"location": value}
        if not isinstance(value, dict):
            return value
        value = read_onto(value)
        directory = (info.context or {}).get("directory")
        value = dict(value)
        for key in ("model", "adapter", "location"):
            if isinstance(value.get(key), str):
                value[key], revision = split_revision(value[key], directory)
                if revision is not None:
                    if value.get("revision") not in (None, revision):
                        found = f'"{revision}" and "{value["revision"]}"'
                        raise ValueError(f"found two revisions, {found}; expected one of them")
                    value["revision"] = revision
        return value

    @model_validator(mode="after")
    def _check(self) -> Source:
        named = [key for key in ("model", "adapter", "location", "train") if getattr(self, key) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ValueError(f"found {found}; expected one of model and adapter, or a plain path or hub id")
        if self.train is not None and self.model_fields_set != {"train"}:
            raise ValueError("`train` stands alone; the training file says the model")
        if "on" in self.model_fields_set and self.adapter is None:
            raise ValueError("`on` is given for what is not an adapter; expected it only beside `adapter`")
        return self

    @property
    def where(self) -> str:
        """The local folder or hub id, whatever its kind."""
        return self.model or self.adapter or self.location or self.train or ""

    def __str__(self) -> str:
        return f"{self.where}@{self.revision}" if self.revision else self.where


OtherName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,49}$")]
"""The name of a source beside the roles."""


class Sources(Strict):
    """The models a recipe reads, by role. Two roles may name the same thing."""

    base: Source | None = None
    """The unaligned model; V = aligned − base spans the safety subspace. Needed where V is."""
    aligned: Source
    """The aligned model: deltas are taken from it and adapters apply to it."""
    finetuned: Source
    """The fine-tuned model whose safety is to be restored."""
    safety: Source | None = None
    """The safety model or adapter. Needed where Δs is."""
    others: Annotated[dict[OtherName, Source], Field(max_length=100)] = Field(default={})
    """Further models and adapters by names of their own; `merge.weights` says what they weigh."""

    @model_validator(mode="after")
    def _check(self) -> Sources:
        problems = Problems([])
        for name in self.others:
            if name in ROLES:
                problems.add(("others", name), "found the name of a role; expected one of its own")
        for role, source in self.roles().items():
            if source.train is not None and role not in ("safety", "finetuned"):
                problems.add((role, "train"), "is trained on `aligned`; expected `train` only for safety and finetuned")
            if source.adapter is None:
                continue
            if source.on == role:
                problems.add((role, "on"), f"an adapter for `{role}` cannot apply to `{role}` itself", source.on)
            if source.on == "base" and self.base is None:
                problems.add((role, "on"), "applies to `base`; expected `sources.base` to be given", source.on)
        if self.base and self.base.adapter and self.aligned.adapter and not problems.found:
            problems.add(("aligned",), "`base` and `aligned` are adapters on each other; expected one full model")
        problems.check("Sources")
        return self

    def roles(self) -> dict[Role, Source]:
        """The sources that are given, by role."""
        given = {role: getattr(self, role) for role in ROLES}
        return {role: source for role, source in given.items() if source is not None} | self.others

    def changed(self, sources: Mapping[Role, Source]) -> Sources:
        """The same with other sources in some roles."""
        own = {role: source for role, source in sources.items() if role in ROLES}
        others = self.others | {name: source for name, source in sources.items() if name not in ROLES}
        return self.model_copy(update={**own, "others": others})


def source_holders(sources: object) -> Iterator[tuple[dict[str, Any], Role]]:
    """In the plain values of a recipe's `sources`: (the mapping that holds a source, its role there)."""
    given = sources if isinstance(sources, dict) else {}
    yield from ((given, role) for role in list(given) if role != "others")
    others = given.get("others")
    yield from ((others, name) for name in list(others)) if isinstance(others, dict) else ()
