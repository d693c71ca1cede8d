"""adapter_config.json: what is understood, what has no effect on the result, and what is refused by name.

A field that this module does not know, and that is set, is refused: PEFT's fields change what an adapter
means, and a merge that ignores one is silently wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.checkpoint import read_object
from safemerge_recipes.errors import SourceError

CONFIG_FILE = "adapter_config.json"

_UNDERSTOOD = frozenset(
    [
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    ]
)
# They steer training or loading; the keys that the file holds are checked one by one.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ephemeral_gpu_offload",
        "eva_config",
        "inference_mode",
        "layers_pattern",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    ]
)
# Initialisations that also change the base model's own weights: W + s·B·A is then not the trained model.
_MUTATED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of a LoRA config that say what its tensors mean."""

    path: Path
    values: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The model that the adapter was made for."""
        base = self.values.get("base_model_name_or_path")
        return base if isinstance(base, str) else None

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether adapted weights are stored `(d_in, d_out)`."""
        return bool(self.values.get("fan_in_fan_out"))

    @property
    def dora(self) -> bool:
        """Whether adapted weights are rescaled to a trained length."""
        return bool(self.values.get("use_dora"))

    @property
    def bias(self) -> str:
        """Which of the base model's biases were trained: none, all or lora_only."""
        return str(self.values.get("bias") or "none")

    @property
    def keeps_tied(self) -> bool:
        """Whether tied layers were trained as one."""
        return bool(self.values.get("ensure_weight_tying"))

    def names(self, field: str) -> tuple[str, ...]:
        """A field that lists names; empty where it holds none, or a pattern.

        Raises:
            SourceError: it holds something else.
        """
        value = self.values.get(field)
        if value is None or isinstance(value, str):
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise SourceError(f"{self.path}: {field} is {str(value)[:80]!r}; expected a list of names")
        return tuple(value)

    def scale(self, module: str, rank: int) -> float:
        """s of s·B·A for a module whose stored factors have this rank.

        Raises:
            SourceError: the config gives the module another rank, or no sensible alpha.
        """
        declared = self._pattern_value("rank_pattern", module, self.values.get("r"))
        alpha = self._pattern_value("alpha_pattern", module, self.values.get("lora_alpha"))
        if declared != rank:
            raise SourceError(
                f"{self.path}: {module}: the config says rank {declared}, the stored factors have {rank}; "
                "they must agree"
            )
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise SourceError(f"{self.path}: {module}: lora_alpha is {alpha!r}; expected a number")
        return float(alpha) / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _pattern_value(self, field: str, module: str, default: Any) -> Any:
        """The value of the first pattern that fits, as PEFT looks it up: an end of the module's path."""
        patterns = self.values.get(field) or {}
        if not isinstance(patterns, dict):
            raise SourceError(f"{self.path}: {field} is {str(patterns)[:80]!r}; expected names with numbers")
        for key, value in patterns.items():
            if re.fullmatch(r"[\w.]*", key):
                if module == key or module.endswith("." + key):
                    return value
                continue
            if len(key) > 500 or re.search(r"[+*}]\)?[+*{]", key):
                raise SourceError(
                    f"{self.path}: pattern {key[:80]!r} could take for ever to match; expected a module's name"
                )
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            except re.error as error:
                raise SourceError(f"{self.path}: pattern {key[:80]!r} is no regular expression: {error}") from None
        return default

    def token_indices(self, module: str) -> tuple[int, ...]:
        """The rows that trained tokens of a module replace; plain lists mean the input embedding.

        Raises:
            SourceError: there are none for this module, or they are not distinct row numbers.
        """
        value = self.values.get("trainable_token_indices")
        if isinstance(value, dict):
            value = next((v for k, v in value.items() if module == k or module.endswith("." + k)), None)
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise SourceError(
                f"{self.path}: trainable_token_indices names no row numbers for {module}, of which the file holds "
                "trained rows; they must agree"
            )
        if len(set(value)) != len(value):
            raise SourceError(f"{self.path}: trainable_token_indices names a row of {module} twice")
        return tuple(value)


def read_config(directory: Path) -> AdapterConfig:
    """The config of an adapter folder.

    Raises:
        SourceError: it is missing or unsound, or asks for an update that is not computed here; the field is
            named.
    """
    where = directory / CONFIG_FILE
    values = read_object(where)
    if str(values.get("peft_type", "LORA")).upper() != "LORA":
        raise SourceError(
            f"{where}: peft_type is {str(values['peft_type'])[:40]!r}; expected LORA, the only kind computed here "
            "(merge the adapter with PEFT into a full checkpoint and use that)"
        )
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATED_BASE):
        raise SourceError(
            f"{where}: init_lora_weights is {init[:40]!r}, which changed the base model's weights, so s·B·A is not "
            "the update; save the adapter again with "
            "save_pretrained(path_initial_model_for_weight_conversion=…), which makes it an ordinary LoRA"
        )
    if values.get("bias") not in (None, "none", "all", "lora_only"):
        raise SourceError(f"{where}: bias is {str(values['bias'])[:40]!r}; expected none, all or lora_only")
    for field, value in values.items():
        if value and field not in _UNDERSTOOD | _WITHOUT_EFFECT:
            raise SourceError(
                f"{where}: {field} is {str(value)[:80]!r}, which changes what the adapter adds and is not supported; "
                "expected LoRA or DoRA (merge the adapter with PEFT into a full checkpoint and use that)"
            )
    return AdapterConfig(where, values)
