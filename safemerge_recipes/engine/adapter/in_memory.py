"""The aligned model as PEFT will see it: names in memory, and which modules it adapts, asked of transformers.

An adapter among the sources tells these names itself. Without one the architecture is built without weights and its
parameters are looked for on disk, as those of an adapter are. Nothing is fetched, and no code of a repository runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safemerge_recipes.sources.architecture import owned_class
from safemerge_recipes.sources.experts import FUSED
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.peft.module_names import DiskNames


@dataclass(frozen=True, slots=True)
class InMemory:
    """What transformers makes of the aligned model.

    Attributes:
        names: name on disk -> in memory; of experts that lie one by one, of their parameters.
        linear: the modules of which PEFT adapts the weight.
        turned: parameters of experts that PEFT takes as `(count, d_in, d_out)`.
    """

    names: Mapping[str, str]
    linear: frozenset[str]
    turned: frozenset[str]


def in_memory(family: Family) -> InMemory | None:
    """Of a family in which updates come from full models; None where adapters tell, or transformers cannot."""
    aligned = family.models["aligned"]
    if all(m.checkpoint is aligned.checkpoint for m in family.models.values()):
        return None
    model = _built(aligned.checkpoint.config)
    if model is None:
        return None
    import torch
    from transformers.pytorch_utils import Conv1D

    disk, names = DiskNames(family.inventory), {}
    for name in dict.fromkeys((*(one for one, _ in model.named_parameters()), *model.state_dict())):
        parent, _, parameter = name.rpartition(".")
        separate = disk.experts(parent) if parameter in FUSED else None
        found = f"{separate.parent}.{parameter}" if separate else disk(name)
        if found is not None:
            names[found] = name
    modules = dict(model.named_modules())
    linear = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    turned = {name for name in names.values() if getattr(modules[name.rpartition(".")[0]], "is_transposed", False)}
    return InMemory(names, frozenset(n for n, m in modules.items() if isinstance(m, linear)), frozenset(turned))


def _built(config: Mapping[str, Any]) -> Any:
    """The architecture on the meta device; None where this transformers does not have it."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    owned = owned_class(config, transformers)
    if owned is None:
        return None
    kinds = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    said = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return owned(kinds[config["model_type"]].from_dict(said))
    except Exception:  # whatever a config makes of a class of theirs: then nothing is known
        return None
