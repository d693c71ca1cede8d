"""Metrics, selectors and merge methods by name: the built-in ones and those of installed plugins, by one door.

Entry points of the groups below give a name and an object of this kind: a metric, a `Selector`, a `Method`. Reading
them opens metadata only; an object is imported when a recipe asks for it. The built-in ones are listed
in `recipe.builtins` and come through the same door.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from types import MappingProxyType
from typing import Any, Literal, get_args

from safemerge_recipes._version import __version__
from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe import builtins

Kind = Literal["metrics", "selectors", "methods"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DISTRIBUTION = "safemerge-recipes"
OWN = f"{DISTRIBUTION} {__version__}"

BUILTIN: Mapping[Kind, Mapping[str, str]] = {
    "metrics": builtins.METRICS.targets,
    "selectors": builtins.SELECTORS.targets,
    "methods": builtins.METHODS.targets,
}
"""What this distribution brings: kind -> name -> module:attribute."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered name: what it is, which distribution brings it, and where the object lies."""

    kind: Kind
    name: str
    origin: str
    target: str

    def load(self) -> Any:
        """The object. Raises RecipeError when it cannot be imported or is of another kind."""
        where = f"{self.kind[:-1]} {self.name!r} of {self.origin} ({self.target})"
        try:
            found = EntryPoint(self.name, self.target, f"safemerge.{self.kind}").load()
        except Exception as error:  # a plugin may fail in any way; the recipe that names it hears of it
            raise RecipeError(
                f"{where}: cannot be loaded: {type(error).__name__}: {error}; mend or uninstall the plugin"
            ) from None
        wrong = _wrong_kind(self.kind, found)
        if wrong:
            raise RecipeError(f"{where}: is a {type(found).__name__}; expected {wrong}")
        return found


def _wrong_kind(kind: Kind, found: Any) -> str | None:
    """What was expected, where the object is something else."""
    if kind == "metrics":
        return None if callable(found) else "a function of (Moments, rank)"
    if kind == "selectors":
        from safemerge_recipes.gate.selectors import Selector

        return None if isinstance(found, Selector) else "a safemerge_recipes.plugins.Selector"
    from safemerge_recipes.methods.base import Method

    return None if isinstance(found, Method) else "a safemerge_recipes.plugins.Method"


class Loaded(Mapping[str, Any]):
    """The objects of one kind by name, imported when asked for."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name.startswith("mergekit:"):
            from safemerge_recipes.methods.mergekit import mergekit_method

            return mergekit_method(name.removeprefix("mergekit:"))
        if name not in self._loaded:
            self._loaded[name] = self._entries[name].load()
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or (isinstance(name, str) and name.startswith("mergekit:"))


@dataclass(frozen=True, slots=True)
class Registry:
    """Everything registered, by kind and name. Holds names and origins; the objects come when asked for."""

    entries: Mapping[Kind, Mapping[str, Entry]]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics by name."""
        return Loaded(self.entries["metrics"])

    @property
    def selectors(self) -> Mapping[str, Any]:
        """Selectors by name."""
        return Loaded(self.entries["selectors"])

    @property
    def methods(self) -> Mapping[str, Any]:
        """Merge methods by name, `mergekit:<name>` among them."""
        return Loaded(self.entries["methods"])

    def names(self, kind: Kind) -> tuple[str, ...]:
        """The registered names of a kind. Imports nothing."""
        return tuple(self.entries[kind])

    def origin(self, kind: Kind, name: str) -> str:
        """The plugin and version a name comes from, which distinguish results; "" for what is built in."""
        if name.startswith("mergekit:"):
            try:
                return f"mergekit {version('mergekit')}"
            except PackageNotFoundError:
                return ""
        entry = self.entries[kind].get(name)
        return entry.origin if entry and entry.origin != OWN else ""

    def brings(self, method: str) -> str:
        """The origin of a merge method."""
        return self.origin("methods", method)


def _own() -> Iterator[tuple[Kind, str, EntryPoint]]:
    for kind in KINDS:
        for name, target in BUILTIN[kind].items():
            yield kind, OWN, EntryPoint(name, target, f"safemerge.{kind}")


def _installed(found: Iterable[EntryPoint]) -> Iterator[tuple[Kind, str, EntryPoint]]:
    for point in found:
        kind = next((kind for kind in KINDS if point.group == f"safemerge.{kind}"), None)
        if kind is None:
            continue
        dist = point.dist
        name = re.sub(r"[-_.]+", "-", dist.metadata["Name"] or "?").lower() if dist else "an unnamed distribution"
        if name != DISTRIBUTION:  # its own are those of `BUILTIN`, whatever stale metadata says
            yield kind, f"{name} {dist.version}" if dist else name, point


def read_registry(installed: Iterable[EntryPoint] | None = None) -> Registry:
    """The built-in and the installed names.

    Args:
        installed: entry points to read instead of those of the environment.

    Raises:
        RecipeError: two distributions register one name.
    """
    if installed is None:
        found = entry_points()  # once: it looks at every installed distribution
        installed = [point for kind in KINDS for point in found.select(group=f"safemerge.{kind}")]
    entries: dict[Kind, dict[str, Entry]] = {kind: {} for kind in KINDS}
    for kind, origin, point in (*_own(), *_installed(installed)):
        entry = Entry(kind, point.name, origin, point.value)
        known = entries[kind].setdefault(point.name, entry)
        if known != entry:
            raise RecipeError(
                f"plugins: the {kind[:-1]} {point.name!r} is registered twice, by {known.origin} ({known.target}) "
                f"and by {entry.origin} ({entry.target}); expected one, uninstall one of them"
            )
    return Registry(MappingProxyType({kind: MappingProxyType(found) for kind, found in entries.items()}))


METHODS: Mapping[str, Any] = read_registry([]).methods
"""The built-in methods, and those of mergekit."""
