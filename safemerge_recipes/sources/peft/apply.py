"""A PEFT LoRA adapter: a function from the weights of the model below it to those of the model above.

Follows PEFT's file format without importing PEFT. What adds to a weight (s·B·A, trained biases) becomes a
term of its sum, what replaces it (saved modules) takes its place, and what is not linear in it (DoRA, trained
tokens) becomes an operand that holds the weight below. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.checkpoint import same_bytes
from safemerge_recipes.sources.experts import SeparateExperts, expert_delta
from safemerge_recipes.sources.orientation import input_first
from safemerge_recipes.sources.parts import is_draft
from safemerge_recipes.sources.peft.config import CONFIG_FILE, AdapterConfig, read_config
from safemerge_recipes.sources.peft.keys import Keys, read_keys, saved_as_whole
from safemerge_recipes.sources.peft.module_names import DiskNames, different_starts
from safemerge_recipes.sources.vocabulary import embedding_of, is_head
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.safetensors import TensorRef
from safemerge_recipes.tensor_names import block_index, block_of, stack_of
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight
from safemerge_recipes.weights.operands import Fused, LowRankStack, Rescaled, Rows

HEAD = "lm_head.weight"
"""What the output head is called where it comes to exist only because an adapter unties it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter folder: its config and keys, and the identities of the files they were read from."""

    directory: Path
    config: AdapterConfig
    keys: Keys
    identities: tuple[FileIdentity, ...]

    @property
    def base(self) -> str | None:
        """The model that the adapter was made for, as its config names it."""
        return self.config.base

    @property
    def files(self) -> tuple[str, ...]:
        """Weights and config."""
        return tuple(one.path for one in self.identities)


def is_adapter(directory: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (directory / CONFIG_FILE).exists()


def open_adapter(directory: Path) -> Adapter:
    """The adapter of a folder. Reads its config and its weight file's header.

    Raises:
        SourceError: a file is missing or unsound, a key is unexpected, or the config asks for an update that
            is not computed here (PiSSA and others are named in the message).
    """
    config = read_config(directory)
    keys = read_keys(directory, config)
    return Adapter(directory, config, keys, (*keys.identities, FileIdentity.of(config.path)))


@dataclass(slots=True)
class _Application:
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

    def low_rank(self, name: str, module: str, pair: tuple[TensorRef, TensorRef]) -> LowRank:
        """The update of a linear layer, the way round that its weight is stored."""
        a, b = pair
        scale = self.adapter.config.scale(module, a.shape[0])
        below = self.above[name].shape
        fits = LowRank(b, a, scale, transposed=name in self.turned)
        if fits.shape == below:
            return fits
        other = LowRank(b, a, scale, transposed=name not in self.turned)
        if other.shape == below and self.adapter.config.fan_in_fan_out:
            return other
        raise self.refuse_shape(name, fits.shape, below)

    def module(self, module: str, parts: Mapping[str, TensorRef]) -> None:
        """One adapted module."""
        config, keys = self.adapter.config, self.adapter.keys
        if parts.keys() == {"A", "B"} and self.find(f"{module}.weight") is None and self.expert(module):
            return
        if parts.keys() - {"lora_bias", "base_bias"}:
            name = self.target(f"{module}.weight")
            if "base_weight" in parts:
                self.replace(name, parts["base_weight"])
            pair, embedding = keys.pair(module), keys.pair(module, "embedding_")
            below = self.above[name]
            if pair is not None:
                update = self.low_rank(name, module, pair)
            elif embedding is not None:
                a, b = embedding
                update = LowRank(b, a, config.scale(module, a.shape[0]), transposed=True)
                if update.shape != below.shape:
                    raise self.refuse_shape(name, update.shape, below.shape)
            if pair or embedding:
                above = below + Weight.of(update)
                if "magnitude" in parts:
                    above = Weight.of(self.rescaled(name, above, parts["magnitude"], update.transposed))
                self.above[name] = above
            if "tokens" in parts:
                self.above[name] = self.with_rows(name, module, parts["tokens"])
        if "base_bias" in parts or "lora_bias" in parts:
            if "lora_bias" in parts and self.find(f"{module}.bias") is None:
                raise SourceError(
                    f"{self.adapter.config.path}: lora_bias is set, but {module} has no bias that the trained one "
                    "could be added to; expected layers with a bias (PEFT cannot merge this adapter either)"
                )
            name = self.target(f"{module}.bias")
            if "base_bias" in parts:
                self.replace(name, parts["base_bias"])
            if "lora_bias" in parts:
                bias = parts["lora_bias"]
                if bias.shape != self.above[name].shape:
                    raise self.refuse_shape(name, bias.shape, self.above[name].shape)
                a, _ = keys.pair(module) or (bias, bias)
                self.above[name] += config.scale(module, a.shape[0]) * Weight.of(Stored(bias))

    def expert(self, module: str) -> bool:
        """One expert's matrix where the model has them fused; False where it has not."""
        shapes = {name: weight.shape for name, weight in self.above.items() if len(weight.shape) == 3}
        place = expert_delta(f"{module}.weight", shapes, self.find)
        pair = self.adapter.keys.pair(module)
        if place is None or pair is None:
            return False
        fused, number, first, rows = place
        update = LowRank(pair[1], pair[0], self.adapter.config.scale(module, pair[0].shape[0]))
        if fused in self.turned or update.shape != (rows, shapes[fused][2]):
            raise self.refuse_shape(f"{module}.weight", update.shape, (rows, shapes[fused][2]))
        self.experts.setdefault(fused, {})[number, first] = update
        self.adapted.add(fused)
        if (f"{module}.weight", fused) not in self.translated:
            self.translated.append((f"{module}.weight", fused))
        return True

    def add_experts(self) -> None:
        """The updates of single experts, as one update of each fused tensor."""
        for fused, updates in self.experts.items():
            shape = self.above[fused].shape
            parts: list[tuple[int, Weight]] = []
            at = 0
            for (number, first), update in sorted(updates.items()):
                begin = number * shape[1] + first
                parts += [(begin - at, Weight())] if begin > at else []
                parts.append((update.shape[0], Weight.of(update)))
                at = begin + update.shape[0]
            if at < shape[0] * shape[1]:
                parts.append((shape[0] * shape[1] - at, Weight()))
            self.above[fused] += Weight.of(Fused(shape, tuple(parts)))

    def check_unlisted(self) -> None:
        """Refuses whole tensors that no field of the config announces, save the embedding and the head."""
        embedding = embedding_of(self.above, self.model)
        for name in self.adapter.keys.unlisted:
            found = self.find(name)
            fits = found is not None and self.adapter.keys.whole[name].shape[1:] == self.above[found].shape[1:]
            if found is None or not fits or not (found == embedding or is_head(found)):
                raise SourceError(
                    f"{self.adapter.keys.path}: unexpected key {name[:200]!r}; expected LoRA factors and what "
                    "modules_to_save and bias name"
                )

    def rescaled(self, name: str, weight: Weight, magnitude: TensorRef, columns: bool) -> Rescaled:
        """DoRA: every output's weights scaled to a trained length."""
        length = weight.shape[1 if columns else 0]
        if magnitude.numel != length:
            raise self.refuse_shape(f"{name} (lora_magnitude_vector)", magnitude.shape, (length,))
        return Rescaled(weight, magnitude, columns)

    def with_rows(self, name: str, module: str, rows: TensorRef) -> Weight:
        """Trained tokens: some rows replaced."""
        below = self.above[name]
        indices = self.adapter.config.token_indices(module)
        if rows.shape != (len(indices), *below.shape[1:]) or max(indices, default=0) >= below.shape[0]:
            raise SourceError(
                f"{self.adapter.directory}: {name} is {below.shape}, the file holds trained rows {rows.shape}, "
                f"trainable_token_indices names {len(indices)} rows up to {max(indices, default=0)}; they must fit"
            )
        runs: list[tuple[int, int, int]] = []
        at = 0
        for row, number in sorted(zip(indices, range(len(indices)), strict=True)):
            if row > at:
                runs.append((0, at, row - at))
            runs.append((1, number, 1))
            at = row + 1
        if at < below.shape[0]:
            runs.append((0, at, below.shape[0] - at))
        return Weight.of(Rows((below, Weight.of(Stored(rows))), tuple(runs)))

    def parameters(self, root: str, levels: list[str]) -> None:
        """A module whose parameters are adapted one by one: fused experts, whichever way they lie on disk.

        PEFT nests one layer in the other and does not name the parameters; shapes tell which is which.
        """
        config, keys = self.adapter.config, self.adapter.keys
        wanted = dict.fromkeys(
            path.rpartition(".")[2]
            for path in config.names("target_parameters")
            if f"{root}.{path.rpartition('.')[2]}".endswith(path)
        )
        shapes = {name: weight.shape for name, weight in self.above.items()}
        experts = self.find.experts(root)
        places: dict[str, tuple[int, ...]] = {}
        for parameter in wanted:
            disk = self.find(f"{root}.{parameter}")
            shape = shapes[disk] if disk else experts.fused(parameter, shapes) if experts else None
            if shape is None:
                raise SourceError(
                    f"{self.adapter.directory}: adapts {root}.{parameter}, which the model it is applied to has "
                    "neither as one tensor nor as separate experts with gate, up and down projections"
                )
            places[parameter] = shape
        for module in levels:
            pair = keys.pair(module)
            if pair is None or keys.modules[module].keys() - {"A", "B"}:
                raise SourceError(f"{keys.path}: {module}: expected nothing but lora_A and lora_B there")
            a, b = pair
            sizes = (b.shape[0], a.shape[1])
            fitting = [p for p, shape in places.items() if sizes in (shape[-2:], shape[:-3:-1])]
            if len(fitting) > 1:  # only square ones fit both ways round
                fitting = [p for p in fitting if sizes == places[p][-2:]]
            if len(fitting) != 1:
                raise SourceError(
                    f"{keys.path}: {module}: factors for {sizes} fit {len(fitting)} of target_parameters "
                    f"{', '.join(f'{p} {places[p]}' for p in places) or '(none named)'}; expected one"
                )
            shape = places.pop(fitting[0])
            count = shape[0] if len(shape) == 3 else 1
            if a.shape[0] % count:
                raise SourceError(f"{keys.path}: {module}: {a.shape[0]} rows of lora_A for {count} experts")
            scale = config.scale(f"{root}.{fitting[0]}", a.shape[0] // count)
            disk = self.find(f"{root}.{fitting[0]}")
            if disk is not None:
                turned = sizes != shape[-2:]
                update = LowRankStack(b, a, scale, count, turned) if len(shape) == 3 else LowRank(b, a, scale, turned)
                self.above[self.target(f"{root}.{fitting[0]}")] += Weight.of(update)
            elif experts is not None:
                if sizes != shape[-2:]:
                    raise self.refuse_shape(f"{root}.{fitting[0]}", sizes, shape[-2:])
                self.separate(experts, fitting[0], LowRankStack(b, a, scale, count))
                if root != experts.parent:
                    self.translated.append((f"{root}.{fitting[0]}", f"{experts.parent}.{fitting[0]}"))
        if places:
            raise SourceError(
                f"{keys.path}: target_parameters names {root}.{next(iter(places))}, which it does not hold"
            )

    def separate(self, experts: SeparateExperts, parameter: str, stack: LowRankStack) -> None:
        """The update of a fused parameter, handed out to experts that lie on disk one by one."""
        gate, up, down = experts.projections
        for number in range(experts.count):
            update = stack.member(number)
            parts = {down: update}
            if parameter == "gate_up_proj":
                half = stack.b.shape[0] // 2
                parts = {
                    gate: LowRank(update.b.part(0, half), update.a, update.scale, columns=update.columns),
                    up: LowRank(update.b.part(half, half), update.a, update.scale, columns=update.columns),
                }
            for projection, part in parts.items():
                name = experts.name(number, projection)
                self.adapted.add(name)
                self.above[name] += Weight.of(part)

    def check_targets(self) -> None:
        """Refuses a file that lacks what target_modules names, in the stacks of blocks that it adapts at all.

        Other parts of the model may have modules of the same names, which the adapter never saw; and blocks for
        multi-token prediction are not there when transformers trains.
        """
        config = self.adapter.config
        stacks = {stack_of(name) for name in self.adapted}
        if config.values.get("exclude_modules"):
            return
        layers = config.values.get("layers_to_transform")
        wanted = {layers} if isinstance(layers, int) else set(layers) if isinstance(layers, list) else None
        saved = config.names("modules_to_save")
        for target in config.names("target_modules"):
            for name, weight in self.above.items():
                module = name.removesuffix(".weight")
                hit = module != name and (module == target or module.endswith(f".{target}"))
                if not hit or len(weight.shape) != 2 or name in self.adapted or ".experts." in name:
                    continue
                if wanted is not None and block_index(name) not in wanted:
                    continue
                if stack_of(name) not in stacks or is_draft(name, self.model):
                    continue
                if saved_as_whole(module, saved):
                    continue
                raise SourceError(
                    f"{self.adapter.keys.path}: has nothing for {name}, which target_modules ({target!r}) names; "
                    "expected every adapted module of the model, is the file complete?"
                )


@dataclass(frozen=True, slots=True)
class Applied:
    """The model above an adapter: its weights, and what a user should know about how they came about.

    `translated` holds (name in memory, name on disk) of tensors for which they differ.
    """

    weights: Mapping[str, Weight]
    notes: tuple[str, ...]
    translated: tuple[tuple[str, str], ...] = ()


def apply_adapter(
    adapter: Adapter, below: Mapping[str, Weight], model: Mapping[str, object], embedding: str | None
) -> Applied:
    """The weights of the model below with the adapter on top.

    Args:
        adapter: the adapter.
        below: every weight of the model it is applied to.
        model: that model's config.json.
        embedding: the input embedding that the output head is tied to, if it is and has no tensor of its own.

    Raises:
        SourceError: a module is not in the model, a tensor does not fit, or the file lacks something.
    """
    keys, notes = adapter.keys, []
    above = dict(below)
    head = HEAD if HEAD not in above else None
    if embedding is not None and head is not None:
        above[head] = above[embedding]
    turned = input_first({name: w.shape for name, w in above.items()}, model)
    work = _Application(adapter, above, DiskNames(above), turned, model)
    work.check_unlisted()
    levels: dict[str, list[str]] = {}
    for module in keys.modules:
        root = module
        while root.endswith(".base_layer"):
            root = root.removesuffix(".base_layer")
        plain = root == module and (work.find(f"{module}.weight") or work.find(f"{module}.bias"))
        if adapter.config.names("target_parameters") and not plain:
            levels.setdefault(root, []).append(module)
        else:
            work.module(module, keys.modules[module])
    for root, modules in levels.items():
        work.parameters(root, modules)
    work.add_experts()
    for name, ref in keys.whole.items():
        work.replace(work.target(name), ref)
    if adapter.config.bias == "all":
        missing = [n for n in below if n.endswith(".bias") and n not in work.adapted]
        if missing:
            raise SourceError(f"{keys.path}: bias is 'all', but nothing is there for {missing[0]}")
    work.check_targets()
    if embedding is not None and head is not None:
        only_tokens = all("tokens" in p for m, p in keys.modules.items() if work.find(f"{m}.weight") == embedding)
        if adapter.config.keeps_tied or (head not in work.adapted and embedding in work.adapted and only_tokens
                                         and not any(work.find(n) == embedding for n in keys.whole)):  # fmt: skip
            above[head] = above[embedding]  # trained as one
        copied = [above[name].stored for name in (head, embedding)]
        if above[head] == above[embedding] or (copied[0] and copied[1] and same_bytes(copied[0], copied[1])):
            del above[head]
        else:
            notes.append(
                f"the adapter changes {embedding} and {head} apart, which the model below ties; "
                "the output has both, with tie_word_embeddings false"
            )
    if work.translated:
        name, found = work.translated[0]
        notes.append(
            f"{len(work.translated)} of the adapter's names were found under others, such as {name} as {found}"
        )
    return Applied(above, tuple(notes), tuple(work.translated))
