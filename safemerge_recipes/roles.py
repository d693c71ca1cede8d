"""The four roles of a recipe as symbolic weights over one inventory of tensor names.

The output follows the aligned model: its names, its order, its shapes. Every other role must fit it tensor
by tensor, and whatever does not is refused by name here, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from safemerge_recipes.adapter import Adapter, apply_adapter, open_adapter
from safemerge_recipes.algebra import Stored, Weight
from safemerge_recipes.checkpoint import Checkpoint, FileIdentity, open_checkpoint
from safemerge_recipes.errors import SourceError
from safemerge_recipes.header import FLOAT_DTYPES, TensorRef
from safemerge_recipes.masks import open_masks
from safemerge_recipes.recipe import Recipe, Role
from safemerge_recipes.sources import Folder, locate

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Model:
    """One role: its folder, its weights by name, and the full checkpoint that lies underneath."""

    folder: Folder
    weights: Mapping[str, Weight]
    checkpoint: Checkpoint
    adapter: Adapter | None

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files that belong to this role itself."""
        return self.adapter.files if self.adapter else self.checkpoint.files


@dataclass(frozen=True, slots=True)
class Family:
    """The models of a recipe over one inventory: `inventory` maps each output tensor to its stored form.

    `masks` holds the tensors of the recipe's mask files, by the path it writes and by name.
    """

    inventory: Mapping[str, TensorRef]
    models: Mapping[Role, Model]
    warnings: tuple[str, ...]
    masks: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)

    def weight(self, role: Role, name: str) -> Weight:
        """The role's weight for one tensor."""
        return self.models[role].weights[name]

    def delta(self, role: Role, name: str) -> Weight:
        """W_role − W_aligned, with everything that cancels gone."""
        return self.weight(role, name) - self.weight("aligned", name)

    def v(self, name: str) -> Weight | None:
        """V = W_aligned − W_base, or None where the recipe has no base."""
        if "base" not in self.models:
            return None
        return self.weight("aligned", name) - self.weight("base", name)

    @property
    def mask_files(self) -> tuple[str, ...]:
        """Every mask file, each once."""
        return tuple(dict.fromkeys(ref.path for tensors in self.masks.values() for ref in tensors.values()))

    def identities(self) -> tuple[FileIdentity, ...]:
        """Every weight file that may be read, each once, as it is now."""
        files = dict.fromkeys(file for model in self.models.values() for file in model.files)
        files.update(dict.fromkeys(self.mask_files))
        return tuple(FileIdentity.of(file) for file in files)


def _open_role(role: Role, folders: Mapping[Role, Folder], recipe: Recipe, opened: dict[Role, Model]) -> Model:
    if role in opened:
        return opened[role]
    folder = folders[role]
    if folder.kind == "model":
        checkpoint = open_checkpoint(folder.path)
        weights = {name: Weight.of(Stored(ref)) for name, ref in checkpoint.tensors.items()}
        opened[role] = Model(folder, weights, checkpoint, None)
        return opened[role]
    source = recipe.sources.roles()[role]
    on: Role = "aligned" if source.on == "aligned" else "base"
    if on == role or on not in folders or (folders[on].kind == "adapter" and recipe.sources.roles()[on].on == role):
        raise SourceError(
            f"sources.{role}: {folder.label}: is an adapter, to be applied to {on!r}; "
            f"expected a full model there (an adapter for `aligned` says `on: base`)"
        )
    below = _open_role(on, folders, recipe, opened)
    adapter = open_adapter(folder.path)
    weights = apply_adapter(adapter, below.weights.__getitem__, below.checkpoint.tensors)
    opened[role] = Model(folder, weights, below.checkpoint, adapter)
    return opened[role]


def _check_config(role: Role, model: Model, aligned: Model) -> None:
    for key in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        found, expected = model.checkpoint.config.get(key), aligned.checkpoint.config.get(key)
        if found != expected:
            raise SourceError(
                f"sources.{role}: {model.folder.label}: config.json says {key} {str(found)[:40]!r}, the aligned "
                f"model {str(expected)[:40]!r}; expected models of one architecture and vocabulary"
            )


def _check_inventory(role: Role, model: Model, inventory: Mapping[str, TensorRef]) -> None:
    tensors = model.checkpoint.tensors
    missing = [name for name in inventory if name not in tensors]
    extra = [name for name in tensors if name not in inventory]
    where = f"sources.{role}: {model.folder.label}"
    if missing or extra:
        lines = [f"lacks {len(missing)} tensors of the aligned model, first {missing[0]!r}"] if missing else []
        lines += [f"has {len(extra)} tensors that the aligned model lacks, first {extra[0]!r}"] if extra else []
        raise SourceError(f"{where}: {' and '.join(lines)}; expected models of one architecture, saved alike")
    for name, ref in inventory.items():
        if tensors[name].shape != ref.shape:
            raise SourceError(
                f"{where}: {name} is {tensors[name].shape}, the aligned model's is {ref.shape}; "
                "expected models of one architecture and vocabulary"
            )


def _check_dtypes(family: Mapping[Role, Model], inventory: Mapping[str, TensorRef]) -> None:
    for role, model in family.items():
        for name in inventory:
            for ref in model.weights[name].refs:
                if ref.dtype not in FLOAT_DTYPES and model.weights[name].stored is None:
                    raise SourceError(
                        f"sources.{role}: {name} is stored as {ref.dtype}; an adapter needs float weights"
                    )


def _base_warning(role: Role, model: Model, models: Mapping[Role, Model], on: str) -> str | None:
    named = model.adapter.base if model.adapter else None
    below = models.get(on)  # type: ignore[call-overload]  # `on` is a role by the recipe's own check
    if not named or below is None:
        return None
    own = {below.folder.label.rstrip("/"), str(below.folder.path), below.folder.path.name}
    if named.rstrip("/") in own or Path(named).name in {Path(label).name for label in own}:
        return None
    return f"sources.{role}: the adapter was made for {named!r} and is applied to {on}, {below.folder.label!r}"


def open_family(recipe: Recipe, directory: Path) -> Family:
    """Locates and opens every source and checks that they fit together. Reads headers only.

    Args:
        recipe: the recipe.
        directory: its folder; relative paths start there.

    Raises:
        SourceError: a source is missing, unsound, or does not fit the aligned model.
    """
    sources = recipe.sources.roles()
    folders = {role: locate(source, role, directory) for role, source in sources.items()}
    opened: dict[Role, Model] = {}
    for role in folders:
        _open_role(role, folders, recipe, opened)
    models = {role: opened[role] for role in folders}
    aligned = models["aligned"]
    inventory = aligned.checkpoint.tensors
    for role, model in models.items():
        if model.checkpoint is not aligned.checkpoint:
            _check_config(role, model, aligned)
            _check_inventory(role, model, inventory)
    _check_dtypes(models, inventory)
    found = (_base_warning(role, model, models, sources[role].on) for role, model in models.items())
    warnings = tuple(warning for warning in found if warning)
    return Family(inventory, models, warnings, open_masks(recipe, directory))
