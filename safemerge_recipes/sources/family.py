"""The sources of a recipe as symbolic weights over one inventory of tensor names.

The output follows the aligned model: its names, its order, its shapes. Every other role must fit it tensor
by tensor, and whatever does not is refused by name here, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.model import Recipe, Role
from safemerge_recipes.sources.checkpoint import Checkpoint, open_checkpoint, same_bytes
from safemerge_recipes.sources.locate import Folder, Known, locate
from safemerge_recipes.sources.masks import check_masks, open_masks
from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.sources.orientation import input_first
from safemerge_recipes.sources.peft.adapter import Adapter, open_adapter
from safemerge_recipes.sources.peft.apply import apply_adapter
from safemerge_recipes.sources.quantised.find import groups
from safemerge_recipes.sources.quantised.group import Group
from safemerge_recipes.sources.quantised.names import dequantise
from safemerge_recipes.sources.reconcile import Side, reconcile
from safemerge_recipes.sources.vocabulary import embedding_of, is_head
from safemerge_recipes.storage.dtypes import BY_TORCH_NAME, FLOAT_DTYPES
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.safetensors import Header, TensorRef
from safemerge_recipes.tensor_names import block_index, stack_of
from safemerge_recipes.weights.algebra import Operand, Stored, Weight
from safemerge_recipes.weights.operands import plain_refs


@dataclass(frozen=True, slots=True)
class Model:
    """One role: its folder, its weights by name, and the full checkpoint that lies underneath."""

    folder: Folder
    weights: Mapping[str, Weight]
    checkpoint: Checkpoint
    adapter: Adapter | None
    notes: tuple[str, ...] = ()
    translated: tuple[tuple[str, str], ...] = ()
    forms: Mapping[str, Group] = field(default_factory=dict)
    """Quantised weights of the checkpoint underneath, by the weight's name."""

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files that belong to this role itself."""
        return tuple(one.path for one in self.identities)

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Those of its files, as they were when their headers were read."""
        return self.adapter.identities if self.adapter else self.checkpoint.identities


@dataclass(frozen=True, slots=True)
class Family:
    """The models of a recipe over one inventory: `inventory` maps each output tensor to its stored form.

    `owner` is the role whose config and tokenizer the output has, `config_edits` what must differ in that
    config, `input_first` names the matrices that are stored `(d_in, d_out)`, `masks` holds the tensors of the
    recipe's mask files, by the path it writes and by name, `mask_identities` those of the files;
    `absent` the tensors for multi-token prediction that a role lacks, with that role;
    `quantised` every tensor that is a part of a quantised weight which is only copied, with its kind; `coded` the
    quantised weights that can be read, by operand; `blocks` the number of blocks of each stack, such as 32 of
    `model.layers`.
    """

    inventory: Mapping[str, TensorRef]
    models: Mapping[Role, Model]
    warnings: tuple[str, ...]
    owner: Role = "finetuned"
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    input_first: frozenset[str] = frozenset()
    embedding: str | None = None
    masks: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)
    absent: Mapping[str, Role] = field(default_factory=dict)
    quantised: Mapping[str, str] = field(default_factory=dict)
    coded: Mapping[Operand, Group] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    mask_identities: tuple[FileIdentity, ...] = ()

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

    def form(self, name: str) -> Group | None:
        """How the aligned model stores a weight that is quantised and can be read; None for all others."""
        found = self.models["aligned"].forms.get(name)
        return found if found is not None and found.operand is not None and name in self.inventory else None

    def stored_as(self, role: Role, name: str) -> Group | None:
        """The quantised tensors that hold a role's weight and nothing else does: its values, under their own names."""
        terms = self.weight(role, name).terms
        return self.coded.get(terms[0][1]) if len(terms) == 1 and terms[0][0] == 1 else None

    @property
    def mask_files(self) -> tuple[str, ...]:
        """Every mask file, each once."""
        return tuple(dict.fromkeys(one.path for one in self.mask_identities))

    @property
    def away(self) -> dict[str, tuple[Role, str]]:
        """The weight files that are still on the hub: path of the header -> (a role that reads it, file name)."""
        found = [(role, model.folder) for role, model in self.models.items()]
        return {str(away.header): (role, name) for role, folder in found for name, away in folder.away.items()}

    def bytes_away(self, headers: Collection[str] | None = None) -> int:
        """Bytes of the weight files that are still on the hub, each once; of all, or those with these headers."""
        found = (model.folder.away.values() for model in self.models.values())
        sizes = {str(one.header): one.size for away in found for one in away}
        return sum(size for header, size in sizes.items() if headers is None or header in headers)

    def is_here(self, role: Role) -> bool:
        """Whether all weight files that a role's weights come from lie on this machine."""
        return not set(self.files_behind(role)) & set(self.away)

    def files_behind(self, role: Role) -> tuple[str, ...]:
        """Every weight file that a role's weights come from: of an adapter its own and the checkpoint's underneath."""
        return tuple(one.path for one in self.identities_behind(role))

    def identities_behind(self, role: Role) -> tuple[FileIdentity, ...]:
        """Those of `files_behind`."""
        model = self.models[role]
        return each_once((*model.identities, *model.checkpoint.identities))

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Every file that may be read, each once, as it was when it was opened."""
        own = (one for model in self.models.values() for one in model.identities)
        return each_once((*own, *self.mask_identities))


def each_once(identities: Iterable[FileIdentity]) -> tuple[FileIdentity, ...]:
    """Those of files that several roles share once."""
    found: dict[str, FileIdentity] = {}
    for one in identities:
        found.setdefault(one.path, one)
    return tuple(found.values())


def blocks_of(names: Iterable[str]) -> dict[str, int]:
    """The number of blocks of each stack."""
    found: dict[str, int] = {}
    for name in names:
        stack, index = stack_of(name), block_index(name)
        if stack is not None and index is not None:
            found[stack] = max(found.get(stack, 0), index + 1)
    return found


def tied_pair(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(head, embedding) of a checkpoint that ties them and stores the head all the same, as an equal copy."""
    embedding = embedding_of(checkpoint.tensors, checkpoint.config) if checkpoint.tied else None
    head = next((name for name in checkpoint.tensors if is_head(name) and name.endswith(".weight")), None)
    if embedding is None or head is None:
        return None
    return (head, embedding) if same_bytes(checkpoint.tensors[head], checkpoint.tensors[embedding]) else None


def _weights(checkpoint: Checkpoint, forms: Mapping[str, Group]) -> dict[str, Weight]:
    """A checkpoint's weights by name: quantised ones that can be read as one operand, all others as they are stored."""
    readable = {part: form for form in forms.values() if form.operand is not None for part in form.names}
    weights: dict[str, Weight] = {}
    for name, ref in checkpoint.tensors.items():
        form = readable.get(name)
        if form is None:
            weights[name] = Weight.of(Stored(ref))
        elif form.operand is not None and form.name not in weights:
            weights[form.name] = Weight.of(form.operand)
    return weights


def _open_role(role: Role, folders: Mapping[Role, Folder], recipe: Recipe, opened: dict[Role, Model]) -> Model:
    if role in opened:
        return opened[role]
    folder = folders[role]
    if folder.kind == "model":
        checkpoint = open_checkpoint(folder.path, folder.away)
        forms = groups(checkpoint.tensors, checkpoint.config)
        weights = _weights(checkpoint, forms)
        copied = tied_pair(checkpoint)
        if copied is not None:
            del weights[copied[0]]  # a copy of the embedding
        opened[role] = Model(folder, weights, checkpoint, None, forms=forms)
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
    config = below.checkpoint.config
    tied = below.checkpoint.tied and not any(is_head(name) for name in below.weights)
    embedding = embedding_of(below.weights, config) if tied else None
    above = apply_adapter(adapter, below.weights, config, embedding)
    notes = tuple(f"sources.{role}: {note}" for note in above.notes)
    notes = (*below.notes, *notes)
    opened[role] = Model(folder, above.weights, below.checkpoint, adapter, notes, above.translated, below.forms)
    return opened[role]


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _check_config(role: Role, model: Model, aligned: Model) -> None:
    """Refuses another architecture. Sizes count only where both configs say them; shapes decide the rest."""
    own, other = model.checkpoint.config, aligned.checkpoint.config
    for key in ("model_type", *_SIZES):
        found, expected = setting(own, key), setting(other, key)
        if key == "model_type" and {own.get(key), setting(own, key)} & {other.get(key), setting(other, key)}:
            continue  # a multimodal model and its text model
        if found is not None and expected is not None and found != expected:
            raise SourceError(
                f"sources.{role}: {model.folder.label}: config.json says {key} {str(found)[:40]!r}, the aligned "
                f"model {str(expected)[:40]!r}; expected models of one architecture"
            )


def _tokenizer(model: Model) -> Path:
    """The folder whose tokenizer a role has: an adapter's own, else that of the model underneath."""
    own = any((model.folder.path / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))
    return model.folder.path if own else model.checkpoint.directory


def _check_dtypes(family: Mapping[Role, Model], inventory: Mapping[str, TensorRef]) -> None:
    for role, model in family.items():
        for name in inventory:
            for ref in plain_refs(model.weights[name]):
                if ref.dtype not in FLOAT_DTYPES and model.weights[name].stored is None:
                    raise SourceError(
                        f"sources.{role}: {name} is stored as {ref.dtype}; an adapter needs float weights"
                    )


def _check_quantised(models: Mapping[Role, Model], parts: Mapping[str, str]) -> None:
    """Refuses updates of quantised weights, whose tensors are no weights that could be added to or averaged."""
    for role in (role for role in models if role not in ("base", "aligned")):
        model = models.get(role)
        for name, kind in parts.items():
            if model is not None and not (model.weights[name] - models["aligned"].weights[name]).is_zero:
                raise SourceError(
                    f"sources.{role}: {model.folder.label}: changes {name}, which is quantised ({kind}); expected "
                    f"plain weights there: {dequantise('the aligned model and of this one', kind)}"
                )


def _base_warning(role: Role, model: Model, models: Mapping[Role, Model], on: str) -> str | None:
    named = model.adapter.base if model.adapter else None
    below = models.get(on)
    if not named or below is None or below.adapter or below.folder.revision is None:
        return None  # a folder's name says nothing of the model in it; a hub id does
    if Path(named).name == Path(below.folder.label.partition("@")[0]).name:
        return None
    return f"sources.{role}: the adapter was made for {named!r} and is applied to {on}, {below.folder.label!r}"


def open_family(
    recipe: Recipe,
    directory: Path,
    *,
    headers: bool = False,
    folders: Mapping[Role, Folder] | None = None,
    masks: bool = True,
) -> Family:
    """Locates and opens every source and checks that they fit together. Reads headers only.

    Args:
        recipe: the recipe.
        directory: its folder; relative paths start there.
        headers: of models on the hub fetch the headers alone.
        folders: where the sources lie, if that is known.
        masks: whether its mask files are opened; they need not be there where one is to be made.

    Raises:
        SourceError: a source is missing, unsound, or does not fit the aligned model.
    """
    sources = recipe.sources.roles()
    known: Known = {}
    folders = folders or {
        role: locate(source, role, directory, headers=headers, known=known) for role, source in sources.items()
    }
    opened: dict[Role, Model] = {}
    for role in folders:
        _open_role(role, folders, recipe, opened)
    models = {role: opened[role] for role in folders}
    aligned = models["aligned"]
    for role, model in models.items():
        if model.checkpoint is not aligned.checkpoint:
            _check_config(role, model, aligned)
    sides = {
        role: Side(model.folder.label, model.weights, model.checkpoint, _tokenizer(model), model.forms)
        for role, model in models.items()
    }
    fitted = reconcile(sides, recipe.vocabulary, BY_TORCH_NAME.get(recipe.output.dtype or ""))
    models = {role: replace(model, weights=fitted.weights[role]) for role, model in models.items()}
    forms = [form for model in models.values() for form in model.forms.values()]
    closed = {name: form.kind for form in forms if form.operand is None for name in form.names}
    parts = {name: kind for name, kind in closed.items() if name in fitted.inventory}
    _check_quantised(models, parts)
    _check_dtypes(models, fitted.inventory)
    found = [_base_warning(role, model, models, sources[role].on) for role, model in models.items()]
    notes = dict.fromkeys((*(note for model in models.values() for note in model.notes), *fitted.notes))
    shapes = {name: ref.shape for name, ref in fitted.inventory.items()}
    family = Family(
        fitted.inventory, models, (*(warning for warning in found if warning), *notes),
        fitted.owner, fitted.config_edits, input_first(shapes, aligned.checkpoint.config),
        embedding_of(aligned.checkpoint.tensors, aligned.checkpoint.config),
        {}, fitted.absent, parts, {form.operand: form for form in forms if form.operand is not None},
        blocks_of(fitted.inventory),
    )  # fmt: skip
    return with_masks(family, open_masks(recipe, directory)) if masks else family


def with_masks(family: Family, masks: Mapping[str, Header]) -> Family:
    """A family with further mask files, by the path as a recipe writes it.

    Raises:
        SourceError: a file was made from other models.
    """
    if not masks:
        return family
    check_masks(masks, {role: family.identities_behind(role) for role in family.models if family.is_here(role)})
    tensors = {path: header.tensors for path, header in masks.items()}
    identities = (*family.mask_identities, *(header.identity for header in masks.values()))
    return replace(family, masks={**family.masks, **tensors}, mask_identities=each_once(identities))
