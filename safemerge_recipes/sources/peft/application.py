"""One adapter on one model while it is put together: where a name leads, and what lies above it so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.peft.adapter import Adapter
from safemerge_recipes.sources.peft.module_names import DiskNames, different_starts
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.tensor_names import block_of
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight


@dataclass(slots=True)
class Application:
    """One adapter on one model, while its weights are put together. `above` starts as what lies below."""

    adapter: Adapter
    above: dict[str, Weight]
    find: DiskNames
    turned: frozenset[str]
    model: Mapping[str, object]
    experts: dict[str, dict[tuple[int, int], LowRank]] = field(default_factory=dict)
    adapted: set[str] = field(default_factory=set)
    translated: list[tuple[str, str]] = field(default_factory=list)
    starts: dict[str, str] = field(default_factory=dict)

    def target(self, name: str) -> str:
        """The tensor on disk of a name in memory."""
        found = self.find(name)
        if found is None:
            alike, other = self.find.candidates(name), self.find.elsewhere(name)
            if alike or len(other) > 1:
                raise SourceError(
                    f"{self.adapter.directory}: adapts {name}, which could be {' or '.join((alike or other)[:4])}; "
                    "expected names that tell them apart"
                )
            like = f"{other[0]} is like it, in another part of the model, where nothing is added; " if other else ""
            raise SourceError(
                f"{self.adapter.directory}: adapts {name}, which the model it is applied to does not have; {like}"
                "is it the adapter of another model, or of a model saved under other names?"
            )
        if found != name and (name, found) not in self.translated:
            self.translated.append((name, found))
        path, elsewhere = different_starts(name, found)
        if self.starts.setdefault(path, elsewhere) != elsewhere:
            raise SourceError(
                f"{self.adapter.directory}: adapts {name}, which the model it is applied to does not have (others of "
                f"{path} are under {self.starts[path]}, and nothing like it is there)"
            )
        self.adapted.add(found)
        return found

    def refuse_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> SourceError:
        """The error of an update whose shape is not its tensor's."""
        return SourceError(
            f"{self.adapter.directory}: {name}: the update is {found}, the model's tensor is {expected}; "
            "is it the adapter of another model?"
        )

    def replace(self, name: str, ref: TensorRef) -> None:
        """Another tensor in a tensor's place. Embeddings and heads, which lie outside the blocks, may be resized."""
        below = self.above[name].shape
        resized = block_of(name) is None and len(below) == len(ref.shape) and below[1:] == ref.shape[1:]
        if ref.shape != below and not resized:
            raise self.refuse_shape(name, ref.shape, below)
        self.above[name] = Weight.of(Stored(ref))
