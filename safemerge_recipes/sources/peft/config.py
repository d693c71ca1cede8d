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

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.patterns import Matcher, compile_patterns
from safemerge_recipes.sources.checkpoint import read_object

CONFIG_FILE = "adapter_config.json"
MAX_SCALE = 1e30
"""Greatest s of s·B·A; float32 ends eight powers of ten above."""
MAX_EXPRESSIONS = 200
"""Most regular expressions a config's table may hold."""

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


class PatternTable:
    """`rank_pattern` or `alpha_pattern`: the value of the first key that fits, as PEFT looks it up.

    A key fits the end of a module's path. A plain key is that end; any other is a regular expression, which a
    stranger wrote and which is therefore bounded.
    """

    def __init__(self, where: Path, field: str, config: Mapping[str, Any]) -> None:
        table = config.get(field) or {}
        if not isinstance(table, dict):
            raise SourceError(f"{where}: {field} is a {type(table).__name__}; expected module names with their values")
        self.plain: dict[str, tuple[int, Any]] = {}
        self.expressions: list[tuple[int, Any, Matcher]] = []
        for number, (key, value) in enumerate(table.items()):
            if re.fullmatch(r"[\w.]*", key):
                self.plain[key] = number, value
                continue
            if len(self.expressions) == MAX_EXPRESSIONS:
                raise SourceError(f"{where}: {field} has more than {MAX_EXPRESSIONS} regular expressions")
            try:
                # As PEFT: re.match(rf"(.*\.)?({key})$", module).
                self.expressions.append((number, value, compile_patterns(rf"/(?:.*\.)?(?:{key})/")))
            except ValueError as error:
                raise SourceError(f"{where}: {field}: {error}") from None

    def value(self, module: str, default: Any) -> Any:
        """The value for a module."""
        parts = module.split(".")
        ends = (".".join(parts[n:]) for n in range(len(parts)))
        found = [self.plain[end] for end in ends if end in self.plain]
        found += [(number, value) for number, value, matches in self.expressions if matches(module)]
        return min(found, key=lambda item: item[0])[1] if found else default


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of a LoRA config that say what its tensors mean."""

    path: Path
    values: Mapping[str, Any]
    ranks: PatternTable
    alphas: PatternTable

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
        declared = self.ranks.value(module, self.values.get("r"))
        alpha = self.alphas.value(module, self.values.get("lora_alpha"))
        if type(declared) is not int or declared != rank:
            raise SourceError(
                f"{self.path}: {module}: the config says rank {str(declared)[:40]}, lora_A has {rank} rows; "
                "they must agree"
            )
        try:
            scale = float(alpha) / (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        except (TypeError, ValueError, OverflowError):
            scale = math.nan
        if isinstance(alpha, bool | str) or not abs(scale) <= MAX_SCALE:
            raise SourceError(
                f"{self.path}: {module}: lora_alpha is {str(alpha)[:40]!r}; expected a number, at most {MAX_SCALE:g} r"
            )
        return scale

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
    if "peft_type" not in values and {"fine_tune_type", "lora_parameters"} & values.keys():
        raise SourceError(
            f"{where}: is an adapter of MLX, whose factors are turned; expected PEFT's: merge it with `mlx_lm.fuse`, "
            "and use the model"
        )
    if str(values.get("peft_type", "LORA")).upper() != "LORA":
        raise SourceError(
            f"{where}: peft_type is {str(values['peft_type'])[:40]!r}; expected LORA, the only kind computed here "
            "(merge the adapter with PEFT into a full checkpoint and use that)"
        )
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith("loftq"):
        raise SourceError(
            f"{where}: init_lora_weights is {init[:40]!r}: the factors make up for what LoftQ's quantisation of the "
            "base lost, so they belong to that quantised base alone; expected an adapter of the plain model. Merge it "
            "with PEFT on the base that LoftQ saved, and use the result as a full checkpoint"
        )
    if isinstance(init, str) and init.lower().startswith(_MUTATED_BASE):
        raise SourceError(
            f"{where}: init_lora_weights is {init[:40]!r}, which changed the base model's weights, so s·B·A is not "
            "the update; save the adapter again with "
            "save_pretrained(path_initial_model_for_weight_conversion=…), which makes it an ordinary LoRA"
        )
    if values.get("bias") not in (None, "none", "all", "lora_only"):
        raise SourceError(f"{where}: bias is {str(values['bias'])[:40]!r}; expected none, all or lora_only")
    for field in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(values.get(field), bool | None):  # the text "false" is no false
            raise SourceError(f"{where}: {field} is {str(values[field])[:40]!r}; expected true or false")
    for field, value in values.items():
        if value and field not in _UNDERSTOOD | _WITHOUT_EFFECT:
            raise SourceError(
                f"{where}: {field} is {str(value)[:80]!r}, which changes what the adapter adds and is not supported; "
                "expected LoRA or DoRA (merge the adapter with PEFT into a full checkpoint and use that)"
            )
    ranks, alphas = (PatternTable(where, field, values) for field in ("rank_pattern", "alpha_pattern"))
    return AdapterConfig(where, values, ranks, alphas)
