"""A PEFT LoRA adapter read from its two files: what it adds to which base tensor.

Follows PEFT's file format (adapter_config.json, adapter_model.safetensors) without importing PEFT: the
update of a module's weight is s·B·A with s = alpha/r, or alpha/√r with rsLoRA. Everything the config says
that would change the update, and that this module does not compute, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.algebra import LowRank, Weight
from safemerge_recipes.checkpoint import inside, read_object
from safemerge_recipes.errors import SourceError
from safemerge_recipes.header import FLOAT_DTYPES, TensorRef, read_header
from safemerge_recipes.patterns import Matcher, compile_patterns

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
MAX_EXPRESSIONS = 200
"""Most regular expressions a config's table may hold."""

_UNDERSTOOD = frozenset(
    [
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    ]
)
# They steer training or say which keys the file holds; the keys themselves are checked one by one.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "ephemeral_gpu_offload",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    ]
)
# Initialisations that also change the base model's own weights: W + s·B·A is then not the trained model.
_MUTATED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one adapter folder adds: `updates` maps a base tensor's name to its Δ; `base` names its model."""

    directory: Path
    updates: Mapping[str, Weight]
    base: str | None
    files: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank of its factors."""
        ranks = [op.rank for w in self.updates.values() for _, op in w if isinstance(op, LowRank)]
        return max(ranks, default=0)


def is_adapter(directory: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (directory / CONFIG_FILE).exists()


def _check_config(where: Path, config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise SourceError(
            f"{where}: peft_type is {str(config['peft_type'])[:40]!r}; expected LORA, the only kind computed here"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATED_BASE):
        raise SourceError(
            f"{where}: init_lora_weights is {init[:40]!r}, which changed the base model's weights, so s·B·A is not the "
            "update; save the adapter again with "
            "save_pretrained(path_initial_model_for_weight_conversion=…), which makes it an ordinary LoRA"
        )
    if config.get("bias", "none") != "none":
        raise SourceError(
            f"{where}: bias is {str(config['bias'])[:40]!r}; expected 'none', biases are not merged from adapters"
        )
    for field, value in config.items():
        if value and field not in _UNDERSTOOD | _WITHOUT_EFFECT | {"bias"}:
            raise SourceError(
                f"{where}: {field} is {str(value)[:80]!r}, which changes what the adapter adds and is not supported; "
                "expected plain LoRA (merge the adapter with PEFT into a full checkpoint and use that)"
            )


class _Table:
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


def _scale(where: Path, config: Mapping[str, Any], ranks: _Table, alphas: _Table, module: str, rank: int) -> float:
    declared = ranks.value(module, config.get("r"))
    alpha = alphas.value(module, config.get("lora_alpha"))
    if type(declared) is not int or declared != rank:
        raise SourceError(
            f"{where}: {module}: the config says rank {str(declared)[:40]}, lora_A has {rank} rows; they must agree"
        )
    try:
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, OverflowError):
        scale = math.nan
    if isinstance(alpha, bool | str) or not math.isfinite(scale):
        raise SourceError(f"{where}: {module}: lora_alpha is {str(alpha)[:40]!r}; expected a number")
    return scale


def _factors(where: Path, module: str, found: Mapping[str, TensorRef]) -> tuple[TensorRef, TensorRef]:
    try:
        a, b = found["lora_A"], found["lora_B"]
    except KeyError as error:
        raise SourceError(f"{where}: {module}: has no {error.args[0]}.weight; expected lora_A and lora_B") from None
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise SourceError(
            f"{where}: {module}: lora_A is {a.shape}, lora_B is {b.shape}; expected (r, d_in) and (d_out, r)"
        )
    for name, ref in found.items():
        if ref.dtype not in FLOAT_DTYPES:
            raise SourceError(f"{where}: {module}: {name} is stored as {ref.dtype}; expected one of {FLOAT_DTYPES}")
    return a, b


def open_adapter(directory: Path) -> Adapter:
    """The updates of an adapter folder, by the name of the base tensor they belong to.

    Raises:
        SourceError: a file is missing or unsound, a key is unexpected, or the config asks for an update that
            is not s·B·A (DoRA, PiSSA and others are named in the message).
    """
    where = directory / CONFIG_FILE
    config = read_object(where)
    _check_config(where, config)
    weights = inside(directory, WEIGHTS_FILE)
    if not weights.exists():
        hint = "; adapter_model.bin is a pickle and is never loaded, save it as safetensors"
        old = (directory / "adapter_model.bin").exists()
        raise SourceError(f"{directory}: no {WEIGHTS_FILE}{hint if old else '; expected a PEFT adapter folder'}")
    modules: dict[str, dict[str, TensorRef]] = {}
    for key, ref in read_header(weights).items():
        match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key.removeprefix(KEY_PREFIX))
        if not key.startswith(KEY_PREFIX) or match is None:
            raise SourceError(
                f"{weights}: unexpected key {key[:200]!r}; expected {KEY_PREFIX}<module>.lora_A.weight and lora_B only "
                "(trained biases, embeddings, DoRA magnitudes and saved modules are not supported)"
            )
        modules.setdefault(match[1], {})[match[2]] = ref
    if not modules:
        raise SourceError(f"{weights}: holds no tensor; expected lora_A and lora_B of at least one module")
    ranks, alphas = _Table(where, "rank_pattern", config), _Table(where, "alpha_pattern", config)
    updates: dict[str, Weight] = {}
    for module, found in modules.items():
        a, b = _factors(weights, module, found)
        scale = _scale(where, config, ranks, alphas, module, a.shape[0])
        updates[f"{module}.weight"] = Weight.of(LowRank(b, a, scale, bool(config.get("fan_in_fan_out"))))
    base = config.get("base_model_name_or_path")
    return Adapter(directory, updates, base if isinstance(base, str) else None, (str(weights), str(where)))


def apply_adapter(
    adapter: Adapter, below: Callable[[str], Weight], names: Mapping[str, TensorRef]
) -> dict[str, Weight]:
    """Every tensor's weight with the adapter on top of `below`.

    Raises:
        SourceError: a module is not in the model, or its factors do not fit the tensor's shape.
    """
    for name, update in adapter.updates.items():
        if name not in names:
            raise SourceError(
                f"{adapter.directory}: adapts {name}, which the model it is applied to does not have; "
                "is it the adapter of another model, or of a model saved under other names?"
            )
        if update.shape != names[name].shape:
            raise SourceError(
                f"{adapter.directory}: {name}: the update is {update.shape}, the model's tensor is "
                f"{names[name].shape}; is it the adapter of another model?"
            )
    return {name: below(name) + adapter.updates[name] if name in adapter.updates else below(name) for name in names}
