"""What a collected adapter says of itself: its keys as PEFT names them, and adapter_config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import PlanError
from safemerge_recipes.sources.peft.keys import KEY_PREFIX
from safemerge_recipes.sources.provenance import origin

if TYPE_CHECKING:
    import torch


from safemerge_recipes.engine.adapter.parts import Collector
from safemerge_recipes.sources.experts import FUSED


def finished(collected: Collector) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors by key, and the config."""
    parts = collected.parts
    parameters = _parameters(collected)
    if not parts.tensors and not parts.whole:
        raise PlanError("output.format: adapter: the merged model is the aligned model; there is nothing to write")
    rank = Counter(parts.ranks.values()).most_common(1)[0][0] if parts.ranks else 8
    other = {module: own for module, own in parts.ranks.items() if own != rank}
    saved, bias = [], "none"
    for name, tensor in parts.whole.items():
        module, _, kind = name.rpartition(".")
        if module in parts.ranks:
            bias = "lora_only"
            parts.tensors[f"{module}.base_layer.{kind}"] = tensor
        else:
            saved.append(module)
            parts.tensors[name] = tensor
    saved = [one for one in saved if not any(one.startswith(f"{other}.") for other in saved)]
    _check_saved(saved, parts.ranks)
    for module in {*saved, *(parts.ranks if bias == "lora_only" else ())}:
        _complete(collected, module, whole=module in saved)
    base, revision = _base(collected)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": dict(sorted(other.items())),
        "alpha_pattern": dict(sorted(other.items())),
        "target_modules": sorted(parts.ranks.keys() - parameters),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "modules_to_save": sorted(set(saved)) or None,
        "trainable_token_indices": parts.tokens or None,
        "bias": bias,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(
            name in collected.family.input_first and not collected.experts.fused(name) for name in parts.notes
        ),
        "inference_mode": True,
    }
    if revision is not None:
        config["revision"] = revision
    return {f"{KEY_PREFIX}{name}": parts.tensors[name] for name in sorted(parts.tensors)}, config


def _parameters(collected: Collector) -> set[str]:
    """Takes up the parameters of experts, by their names in memory. PEFT nests the layers of one module: the first
    parameter's innermost."""
    parts, found = collected.parts, set[str]()
    adapted = list(collected.experts.adapted())
    both = {one.parent for one in adapted if one.parameter == FUSED[0]} & {
        one.parent for one in adapted if one.parameter == FUSED[1]
    }
    for one in adapted:
        name = f"{one.parent}.{one.parameter}"
        if one.parent in collected.experts.groups and name not in collected.in_memory and ".mlp." not in name:
            raise PlanError(
                f"output.format: adapter: {one.parent}: experts that lie one by one on disk are one parameter in "
                "memory, whose name an adapter among the sources or transformers must tell, and this transformers does "
                "not know the architecture; say `format: full`"
            )
        name = collected.in_memory.get(name, name)
        root = name.rpartition(".")[0]
        inner = ".base_layer" if one.parent in both and one.parameter == FUSED[0] else ""
        parts.tensors[f"{root}{inner}.lora_A.weight"] = one.a
        parts.tensors[f"{root}{inner}.lora_B.weight"] = one.b
        parts.ranks[name] = one.rank
        found.add(name)
    return found


def _check_saved(saved: Sequence[str], ranks: Collection[str]) -> None:
    """Refuses what PEFT cannot hold: a module as a whole in which another, or its parameters, are adapted.

    Raises:
        PlanError: there is one.
    """
    for module in saved:
        inside = next((one for one in ranks if not module or one.startswith(f"{module}.")), None)
        if inside is not None:
            raise PlanError(
                f"output.format: adapter: {module or 'the model'} has a changed parameter of its own, which is held "
                f"with the whole module or not at all, and in it {inside} has a low-rank update; an adapter holds one "
                "or the other; say `format: full`"
            )


def _complete(collected: Collector, module: str, whole: bool) -> None:
    """PEFT wants all tensors of a saved module, and with bias: lora_only the biases of all adapted ones."""
    known = (disk for disk, name in collected.in_memory.items() if name.rpartition(".")[0] == module)
    place = next(known, f"{module}.").rpartition(".")[0]
    for disk, ref in collected.family.inventory.items():
        rest = disk.removeprefix(f"{place}.")
        if rest == disk or not (whole or rest == "bias"):
            continue
        key = collected.in_memory.get(disk, f"{module}.{rest}") if whole else f"{module}.base_layer.{rest}"
        if key not in collected.parts.tensors:
            collected.parts.tensors[key] = collected.load(ref)


def _base(collected: Collector) -> tuple[str, str | None]:
    """What the adapter's config calls the model it lies on, and its commit: a hub id, or a folder's full path.

    PEFT takes a path relative to wherever the program runs, so only a full one can be found from elsewhere.
    """
    aligned = collected.family.models["aligned"]
    full = (m for m in collected.family.models.values() if m.adapter is None and m.checkpoint is aligned.checkpoint)
    folder = next(full, aligned).folder
    name, revision = origin(folder)
    return (name, revision) if revision else (str(folder.path.resolve()), None)
