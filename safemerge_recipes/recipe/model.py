"""The recipe: what a user declares, as frozen and strictly checked values.

Holds the shape of a recipe, the bounds of its numbers and the checks that need nothing but the recipe. The
docstring under each field is its documentation; the JSON schema and `docs/recipe.md` are made from them.
Knows nothing of YAML and files (`loading`), of checkpoints, or of how a metric or a merge is computed.

Δf = W_finetuned − W_aligned, Δs = W_safety − W_aligned, V = W_aligned − W_base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.composing import add_to_schema
from safemerge_recipes.recipe.patterns import compile_patterns

SELECTORS = (*builtins.SELECTORS, "plugin")
"""The keys of a gate of which exactly one is given."""

UNMEASURED_SELECTORS = frozenset(name for name, row in builtins.SELECTORS.items() if not row.measured)
"""Selectors that decide without the metric, and so without `sources.base`."""

METHOD_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "linear": ("alpha", "space"),
    "slerp": ("alpha", "space"),
    "ties": ("alpha", "density", "lambda", "normalize", "space"),
    "dare_linear": ("alpha", "density", "rescale", "seed", "space"),
    "dare_ties": ("alpha", "density", "lambda", "normalize", "rescale", "seed", "space"),
    "task_arithmetic": ("lambda_finetuned", "lambda_safety", "space"),
    "project": ("normalize",),
    "add_safety_vector": ("gamma", "dare"),
    "svd_k": ("gamma", "rank"),
    "mask": ("mask",),
    "replace": (),
    "drop": (),
}
"""The built-in methods, each with the keys of `merge` that it uses."""

OTHER_PARAMETERS = ("alpha", "seed", "space", "options")
"""The keys of `merge` that `mergekit:*` and methods of plugins may use."""

FACTOR_METHODS = ("linear", "dare_linear")
"""Built-in methods that know `space: factors`."""

SIZE_UNITS: Mapping[str, int] = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
"""Bytes by unit, in capitals."""


def _check_text(text: str) -> str:
    bad = next((char for char in text if not char.isprintable() and char not in "\n\t"), None)
    if bad is not None and (ord(bad) < 32 or 127 <= ord(bad) < 160):
        raise ValueError(f"found the control character {bad!r}; expected printable text")
    return text


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    compile_patterns(patterns)
    return patterns


def parse_size(value: object) -> object:
    """The bytes of a size such as `5GB` (5·10⁹) or `2GiB` (2·2³⁰). What is not text is returned as it is.

    Raises:
        ValueError: the text is not a number with a known unit.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", value)
    if not match or match[2].upper() not in SIZE_UNITS:
        raise ValueError(f'found "{value[:40]}"; expected bytes, or a number with KB, MB, GB, KiB, MiB or GiB')
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def _check_options(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    def check(value: object) -> None:
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"found {value}; expected a finite number")
        elif isinstance(value, dict):
            for key, part in value.items():
                check(key)
                check(part)
        elif isinstance(value, list):
            for part in value:
                check(part)

    check(options)
    return options


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_check_text)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=10_000_000)]
Options = Annotated[dict[str, JsonValue], Field(max_length=100), AfterValidator(_check_options)]
Weight = Annotated[float, Field(ge=-100, le=100)]
Patterns = Annotated[
    tuple[Text, ...],
    Field(strict=False, min_length=1, max_length=10_000),
    BeforeValidator(_as_tuple),
    AfterValidator(_check_patterns),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Size = Annotated[
    int,
    Field(ge=1, le=2**60),
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
]


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def given(self) -> dict[str, Any]:
        """The keys that were written, by the name users write, with their values."""
        fields = type(self).model_fields
        return {
            field.alias or name: getattr(self, name) for name, field in fields.items() if name in self.model_fields_set
        }


@dataclass(slots=True)
class _Problems:
    """Collects problems with their places, to be raised as one error."""

    found: list[InitErrorDetails]

    def add(self, place: Sequence[str | int], message: str, value: object = None) -> None:
        error = PydanticCustomError("recipe", "{message}", {"message": message})
        self.found.append(InitErrorDetails(type=error, loc=tuple(place), input=value))

    def add_all(self, place: Sequence[str | int], errors: ValidationError) -> None:
        for error in errors.errors(include_url=False):
            message = error["msg"].removeprefix("Value error, ")
            self.add((*place, *error["loc"]), message, error["input"])

    def check(self, title: str) -> None:
        if self.found:
            raise ValidationError.from_exception_data(title, self.found)


# Sources

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def split_revision(location: str, directory: Path | None) -> tuple[str, str | None]:
    """The location and revision of `id@revision`; a path keeps its `@`.

    A folder whose name looks like `id@revision` becomes `./id@revision`, which no reader
    takes for anything but a path.
    """
    name, at, revision = location.partition("@")
    if not at or not revision or not _HUB_ID.fullmatch(name):
        return location, None
    if directory is not None and (directory / location).exists():
        return f"./{location}", None
    return name, revision


class Source(_Model):
    """A model or an adapter: a local folder or a hub id. Plain text stands for `location`."""

    model: Text | None = None
    """A checkpoint: local folder or hub id, or `id@revision`."""
    adapter: Text | None = None
    """A PEFT adapter: local folder or hub id, or `id@revision`."""
    location: Text | None = None
    """A checkpoint or an adapter, whichever is found there; the long form of plain text."""
    train: Text | None = None
    """A training file, whose adapter is found in the cache; `safemerge train-adapter` makes it. Only for `safety`
    and `finetuned`."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    subfolder: Text | None = None
    """Folder inside the source that holds the weights."""
    on: Literal["aligned", "base"] = "aligned"
    """The role that the adapter applies to."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            value = {"location": value}
        if not isinstance(value, dict):
            return value
        directory = (info.context or {}).get("directory")
        value = dict(value)
        for key in ("model", "adapter", "location"):
            if isinstance(value.get(key), str):
                value[key], revision = split_revision(value[key], directory)
                if revision is not None:
                    if value.get("revision") not in (None, revision):
                        found = f'"{revision}" and "{value["revision"]}"'
                        raise ValueError(f"found two revisions, {found}; expected one of them")
                    value["revision"] = revision
        return value

    @model_validator(mode="after")
    def _check(self) -> Source:
        named = [key for key in ("model", "adapter", "location", "train") if getattr(self, key) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ValueError(f"found {found}; expected one of model and adapter, or a plain path or hub id")
        if self.train is not None and self.model_fields_set != {"train"}:
            raise ValueError("`train` stands alone; the training file says the model")
        if "on" in self.model_fields_set and self.adapter is None:
            raise ValueError("`on` is given for what is not an adapter; expected it only beside `adapter`")
        return self

    @property
    def where(self) -> str:
        """The local folder or hub id, whatever its kind."""
        return self.model or self.adapter or self.location or self.train or ""

    def __str__(self) -> str:
        return f"{self.where}@{self.revision}" if self.revision else self.where


class Sources(_Model):
    """The models a recipe reads, by role. Two roles may name the same thing."""

    base: Source | None = None
    """The unaligned model; V = aligned − base spans the safety subspace. Needed where V is."""
    aligned: Source
    """The aligned model: deltas are taken from it and adapters apply to it."""
    finetuned: Source
    """The fine-tuned model whose safety is to be restored."""
    safety: Source | None = None
    """The safety model or adapter. Needed where Δs is."""

    @model_validator(mode="after")
    def _check(self) -> Sources:
        problems = _Problems([])
        for role, source in self.roles().items():
            if source.train is not None and role not in ("safety", "finetuned"):
                problems.add((role, "train"), "is trained on `aligned`; expected `train` only for safety and finetuned")
            if source.adapter is None:
                continue
            if source.on == role:
                problems.add((role, "on"), f"an adapter for `{role}` cannot apply to `{role}` itself", source.on)
            if source.on == "base" and self.base is None:
                problems.add((role, "on"), "applies to `base`; expected `sources.base` to be given", source.on)
        if self.base and self.base.adapter and self.aligned.adapter and not problems.found:
            problems.add(("aligned",), "`base` and `aligned` are adapters on each other; expected one full model")
        problems.check("Sources")
        return self

    def roles(self) -> dict[Role, Source]:
        """The sources that are given, by role."""
        return {role: getattr(self, role) for role in get_args(Role) if getattr(self, role) is not None}


# Gate


class Random(_Model):
    """A random choice of tensors, as a control."""

    count: Count | Annotated[dict[Text, Count], Field(min_length=1, max_length=10_000)]
    """How many tensors are chosen; or how many of each module type, such as `{self_attn.q_proj: 3}`."""
    seed: Seed = 0
    """Seed of the choice."""
    per: Literal["module"] | None = None
    """`module` keeps for each module type the count that an even spread gives it."""

    @model_validator(mode="after")
    def _check(self) -> Random:
        if self.per is not None and not isinstance(self.count, int):
            raise ValueError("found `per` beside counts of module types; expected it only beside one number")
        return self


class PluginSelector(_Model):
    """A selector that a plugin registers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}$")]
    """Its name; `safemerge plugins` lists them."""
    options: Options = {}
    """Its parameters, by name."""


class _Selectors(_Model):
    tau: float | None = None
    """Merge where the metric is below this value (strict, unrounded)."""
    at_most: float | None = None
    """Merge where the metric is at most this value, as Safe LoRA does."""
    lowest: int | None = Field(default=None, ge=1, le=10_000_000)
    """Merge this many tensors with the lowest metric; ties by tensor name."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Merge this part of the tensors, those with the lowest metric; rounded up."""
    random: Random | None = None
    """A control: merge tensors chosen at random."""
    names: Patterns | None = None
    """Merge the tensors that match these patterns."""
    names_file: Text | None = None
    """Merge the tensors listed in this file: one pattern a line, `#` starts a comment."""
    always: Literal[True] | None = None
    """Merge every gated tensor."""
    never: Literal[True] | None = None
    """Merge nothing."""
    plugin: PluginSelector | None = None
    """Merge what a plugin's selector picks."""
    per: Literal["module"] | None = None
    """`module` ranks within each module type; only beside `lowest` or `fraction`."""

    def selectors(self) -> list[str]:
        """The selectors that are given."""
        return [name for name in SELECTORS if getattr(self, name, None) is not None]

    def _check_selectors(self) -> None:
        allowed = [name for name in SELECTORS if name in type(self).model_fields]
        found = self.selectors()
        if not found:
            raise ValueError(f"found no selector; expected exactly one of {', '.join(allowed)}")
        if len(found) > 1:
            raise ValueError(f"found {len(found)} selectors, {' and '.join(found)}; expected exactly one")
        if self.per is not None and found[0] not in ("lowest", "fraction"):
            raise ValueError(f"found `per` beside `{found[0]}`; expected it only beside `lowest` or `fraction`")

    @property
    def selector(self) -> tuple[str, Any]:
        """The selector that is given, and its value."""
        name = self.selectors()[0]
        return name, getattr(self, name)


def _exactly_one(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [{"required": [name]} for name in SELECTORS if name in schema["properties"]]


class Complement(_Selectors):
    """Exactly what one selector does not pick."""

    model_config = ConfigDict(json_schema_extra=_exactly_one)

    @model_validator(mode="after")
    def _check(self) -> Complement:
        self._check_selectors()
        return self


class GateChange(_Selectors):
    """The parts of the gate that a rule changes. A selector takes the place of the recipe's."""

    complement: Complement | None = None
    """A control: merge exactly what this selector does not pick."""
    metric: str = Field(default="rho", pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}$")
    """What is measured: `rho` (the paper's cos(VVᵀΔf, Δf)), `rho_ratio` (ρ over its null ρ₀), `cosine`,
    `residual`, `norm_ratio`, `e_diem`, or a plugin's metric."""
    direction: Literal["below", "above"] = "below"
    """Merge where the metric is low (the paper's) or high. With `above`, `tau` means >, `at_most` means ≥,
    and `lowest` and `fraction` take the highest."""
    granularity: Literal["tensor", "module", "block"] = "tensor"
    """What is decided together: a weight matrix, a module, or a block of the model. The metric of a group is
    that of its concatenated deltas."""
    scope: Patterns | None = None
    """Patterns of the tensors that are gated. Default: every 2-D weight of a linear layer that differs
    between aligned and fine-tuned."""
    degenerate: Literal["keep", "merge", "error"] = "keep"
    """What happens where V = 0 or Δf = 0 leaves the metric undefined."""
    precision: Literal["exact", "adaptive"] = "adaptive"
    """`exact` computes every metric in full; `adaptive` only as far as the decision needs."""
    rank: int = Field(default=16, ge=1, le=65536)
    """Rank of the safety subspace for the metric `residual`."""

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        return _check_known("metric", name, builtins.METRICS, info)


class Gate(GateChange):
    """Which tensors are merged: a metric and exactly one selector."""

    model_config = ConfigDict(json_schema_extra=_exactly_one)

    @model_validator(mode="after")
    def _check(self) -> Gate:
        self._check_selectors()
        problems = _Problems([])
        row = builtins.METRICS.get(self.metric)
        low, high = (row.low, row.high) if row else (-math.inf, math.inf)
        owners: list[tuple[tuple[str, ...], _Selectors]] = [((), self)]
        if self.complement is not None:
            owners.append((("complement",), self.complement))
        for place, owner in owners:
            for key in ("tau", "at_most"):
                value = getattr(owner, key)
                if value is None or low <= value <= high:
                    continue
                bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
                message = f"found {value:g}; expected a threshold {bounds} for the metric {self.metric}"
                problems.add((*place, key), message, value)
        if "rank" in self.model_fields_set and self.metric in builtins.METRICS and self.metric != "residual":
            problems.add(("rank",), f"rank is not used by the metric {self.metric}; only by residual")
        problems.check("Gate")
        return self

    @property
    def needs_metric(self) -> bool:
        """Whether the decision depends on the metric."""
        name, value = self.selector
        return (value.selector[0] if name == "complement" else name) not in UNMEASURED_SELECTORS


# Merge


class Dare(_Model):
    """DARE for `add_safety_vector`: elements dropped at random, the rest divided by `density`."""

    on: Literal["vector", "delta"] = "vector"
    """What is thinned out: the safety vector V, or the fine-tuned delta Δf."""
    density: float = Field(default=0.5, gt=0, le=1)
    """The part of the elements that stays."""
    seed: Seed = 0
    """Seed of the choice."""


class Mask(_Model):
    """A mask or score of every element, made elsewhere."""

    path: Text
    """A safetensors file with a tensor of the same name and shape for every merged tensor."""
    threshold: float | None = None
    """Elements with a value above it are replaced. null: the file holds 0 (keep) to 1 (replace); values in
    between mix."""
    invert: bool = False
    """Replace the other elements instead."""
    fill: Literal["safety", "aligned", "zero"] = "safety"
    """What replaced elements become: the safety or the aligned weight, or 0."""


class MergeChange(_Model):
    """The parts of the merge that a rule changes. Another method forgets keys that it does not use."""

    method: str = Field(default="linear", pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}(:[A-Za-z0-9_.-]{1,100})?$")
    """`linear`, `slerp`, `ties`, `dare_linear`, `dare_ties`, `task_arithmetic`, `project`,
    `add_safety_vector`, `svd_k`, `mask`, `replace`, `drop`, `mergekit:<name>`, or a plugin's method."""
    alpha: float = Field(default=0.8, ge=0, le=1)
    """Weight of the fine-tuned side; the safety side has 1 − alpha."""
    density: float = Field(default=0.5, gt=0, le=1)
    """The part of each delta's elements that stays (TIES, DARE)."""
    lambda_: Weight = Field(default=1.0, alias="lambda")
    """Factor of the merged delta (TIES)."""
    normalize: bool | Annotated[str, Field(pattern=r"^(frobenius|spectral|rank:[1-9][0-9]{0,4})$")] | None = None
    """`ties`: whether the sum is divided by the weights that agree (default true). `project`: `frobenius`, C =
    VVᵀ/‖V‖_F (default, the published form; its effect depends on the scale of V), `spectral`, C = VVᵀ/‖VVᵀ‖₂
    (nothing grows, whatever the scale), or `rank:k`, the orthogonal projection on the k leading left
    directions of V."""
    rescale: Literal["density", "l1"] = "density"
    """What makes up for dropped elements: 1/density (the paper's) or the L1 norm (mergekit's)."""
    seed: Seed = 0
    """Seed of the random choice (DARE)."""
    lambda_finetuned: Weight = 1.0
    """Factor of Δf (`task_arithmetic`)."""
    lambda_safety: Weight = 1.0
    """Factor of Δs (`task_arithmetic`)."""
    gamma: Weight = 1.0
    """Factor of the safety vector V, or of its leading part (`add_safety_vector`, `svd_k`)."""
    dare: Dare | None = None
    """Thin out V or Δf at random before they are added (`add_safety_vector`)."""
    rank: int = Field(default=16, ge=1, le=65536)
    """How many leading singular directions of V are added (`svd_k`: Δf + gamma · V_rank)."""
    mask: Mask | None = None
    """The elements to replace (`mask`)."""
    space: Literal["delta", "weights", "factors"] = "delta"
    """What the method sees: the deltas; the weights W_finetuned and W_safety, as mergekit would; or
    (adapters, `linear` and `dare_linear`) the factors A and B one by one, as PEFT does."""
    options: Options = {}
    """Parameters of `mergekit:*` and of a plugin's method, by name."""

    @field_validator("method")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        if ":" in name and not name.startswith("mergekit:"):
            raise ValueError(f'found "{name}"; expected mergekit:<method> where there is a colon')
        return name if ":" in name else _check_known("method", name, builtins.METHODS, info)


class Merge(MergeChange):
    """What a selected tensor becomes."""

    @model_validator(mode="before")
    @classmethod
    def _normalize_default(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("normalize") is None:
            method = value.get("method", "linear")
            if isinstance(method, str) and "normalize" in METHOD_PARAMETERS.get(method, ()):
                return {**value, "normalize": "frobenius" if method == "project" else True}
        return value

    @model_validator(mode="after")
    def _check(self) -> Merge:
        problems = _Problems([])
        used = method_parameters(self.method)
        for key, value in self.given().items():
            if key != "method" and key not in used and value is not None:
                known = f"it uses: {', '.join(used)}" if used else "it uses no other key"
                problems.add((key,), f"{key} is not used by method {self.method}; {known}", value)
        projects = self.method == "project"
        if "normalize" in used and projects == isinstance(self.normalize, bool):
            wanted = "frobenius, spectral or rank:k" if projects else "true or false"
            found = str(self.normalize).lower()
            problems.add(("normalize",), f"found {found}; expected {wanted} for method {self.method}")
        if self.space == "factors" and self.method not in FACTOR_METHODS and self.method in METHOD_PARAMETERS:
            wanted = " and ".join(FACTOR_METHODS)
            problems.add(("space",), f"found factors for method {self.method}; expected it only for {wanted}")
        if self.space == "factors" and self.rescale == "l1" and "rescale" in used:
            problems.add(("rescale",), "found l1 with space factors; expected density, as PEFT does", self.rescale)
        if self.method == "mask" and self.mask is None:
            problems.add(("mask",), "missing; expected a mapping with `path` for method mask")
        problems.check("Merge")
        return self

    def parameters(self) -> dict[str, Any]:
        """The values of the keys that the method uses, by the name users write, in the order of the table."""
        names = {field.alias or name: name for name, field in type(self).model_fields.items()}
        return {key: getattr(self, names[key]) for key in method_parameters(self.method)}


def method_parameters(method: str) -> tuple[str, ...]:
    """The keys of `merge` that a method uses."""
    return METHOD_PARAMETERS.get(method, OTHER_PARAMETERS)


def merge_sources(merge: Merge) -> tuple[Role, ...]:
    """The roles a merge needs besides `aligned` and `finetuned`. Nothing is known of plugins."""
    if merge.mask is not None and merge.mask.fill == "safety":
        return ("safety",)
    if merge.method.startswith("mergekit:"):
        return ("safety",)
    row = builtins.METHODS.get(merge.method)
    return row.needs if row else ()


def _check_known(kind: str, name: str, builtin: Mapping[str, Any], info: ValidationInfo) -> str:
    """Refuses a name that is neither built in nor a plugin's, where the context tells what plugins offer."""
    plugins = (info.context or {}).get(f"{kind}s")
    if plugins is None or name in builtin or name in plugins:
        return name
    import difflib

    known = {known.lower(): known for known in (*builtin, *plugins)}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f'did you mean "{known[close[0]]}"?' if close else f"expected one of {', '.join(known.values())}"
    raise ValueError(f'found "{name}", an unknown {kind}; {hint}')


# Rules


class Rule(_Model):
    """An exception for some tensors. The first rule that matches a tensor wins."""

    tensors: Patterns
    """Patterns of tensor names: globs with braces, or `/regular expressions/`. A rule that matches nothing
    is an error."""
    gate: GateChange | None = None
    """What changes in the gate."""
    merge: MergeChange | None = None
    """What changes in the merge."""
    keep: Literal["finetuned", "aligned", "safety"] | None = None
    """Take these tensors from a source as they are, without gate and merge."""

    @model_validator(mode="after")
    def _check(self) -> Rule:
        changes = [key for key in ("gate", "merge") if getattr(self, key) is not None]
        if self.keep is None and not changes:
            raise ValueError("found a rule that changes nothing; expected gate, merge or keep")
        if self.keep is not None and changes:
            raise ValueError(f"found keep and {' and '.join(changes)}; expected keep alone, or gate and merge")
        return self


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds for the tensors of one rule, or, with `rule` None, for all tensors that no rule matches."""

    patterns: tuple[str, ...]
    keep: Literal["finetuned", "aligned", "safety"] | None
    gate: Gate
    merge: Merge
    rule: int | None


def _change_gate(gate: Gate, change: GateChange | None) -> Gate:
    if change is None:
        return gate
    values = gate.given()
    given = change.given()
    if change.selectors():
        for key in (*SELECTORS, "per"):
            values.pop(key, None)
    if given.get("metric", gate.metric) != gate.metric:
        values.pop("rank", None)
    return Gate.model_validate({**values, **given})


def _change_merge(merge: Merge, change: MergeChange | None) -> Merge:
    if change is None:
        return merge
    values = merge.given()
    given = change.given()
    method = given.get("method", merge.method)
    if method != merge.method:
        # `normalize` and `options` mean something else to each method.
        used = [key for key in method_parameters(method) if key not in ("normalize", "options")]
        values = {key: value for key, value in values.items() if key in used}
        if values.get("space") == "factors" and method not in FACTOR_METHODS:
            del values["space"]
    return Merge.model_validate({**values, **given})


# The rest


class Output(_Model):
    """What is written, and where."""

    path: Text | None = None
    """The folder to write. `--output` stands in for it."""
    format: Literal["full", "adapter"] = "full"
    """`full`: a complete checkpoint. `adapter`: a PEFT LoRA on the aligned model, exact where the merge is
    linear, else truncated to `rank` with the lost energy reported."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the written weights; null: that of each aligned tensor."""
    max_shard_size: Size = 5_000_000_000
    """Largest weight file, in bytes or as `5GB`, `500MB`, `2GiB`."""
    rank: int | None = Field(default=None, ge=1, le=65536)
    """Greatest rank of a written adapter; null: the exact rank, for methods that have one."""
    allow_overflow: bool = False
    """Write values that `dtype` cannot hold as infinities, instead of stopping."""

    @model_validator(mode="after")
    def _check(self) -> Output:
        if self.rank is not None and self.format != "adapter":
            raise ValueError("found rank with format full; expected it only with format adapter")
        return self


class Judge(_Model):
    """Another model's verdict on the answers to harmful requests."""

    kind: Literal["llama-guard-3", "chat", "openai"]
    """`llama-guard-3`: that model, loaded here or behind `url`; `chat`: a model loaded here; `openai`: a server."""
    model: Text
    """The judge's folder or hub id, or its name at the server."""
    prompt: Text | None = None
    """How it is asked: `verdict`, `llama-guard-3`, `harmbench`, `strongreject`, or a file with `{request}` and
    `{answer}`; null: what goes with the kind."""
    url: Text | None = None
    """Base address of an OpenAI-compatible server, such as `http://localhost:8000/v1`; its key is read from
    OPENAI_API_KEY."""

    @model_validator(mode="after")
    def _check(self) -> Judge:
        if self.kind == "openai" and self.url is None:
            raise ValueError("url is missing; expected the server's address, such as http://localhost:8000/v1")
        if self.kind == "chat" and self.url is not None:
            raise ValueError("url goes with kind openai or llama-guard-3")
        return self


class Evaluate(_Model):
    """How the result is scored, with lm-eval."""

    tasks: Annotated[tuple[Text, ...], Field(strict=False, min_length=1, max_length=1000), BeforeValidator(_as_tuple)]
    """Names of lm-eval tasks, or of those shipped here: `safemerge_refusal`, `safemerge_overrefusal`."""
    compare: Annotated[tuple[Role, ...], Field(strict=False, max_length=4), BeforeValidator(_as_tuple)] = ()
    """Sources that are scored as well."""
    limit: int | None = Field(default=None, ge=1, le=10_000_000)
    """Only so many examples of each task; null: all."""
    batch_size: int | None = Field(default=None, ge=1, le=65536)
    """Examples scored together; null: 32 on a CPU, 64 on an accelerator."""
    num_fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Examples shown in the prompt; null: the task's own number."""
    chat_template: bool = True
    """Put prompts through the tokenizer's chat template, if it has one."""
    task_path: Text | None = None
    """A folder with further lm-eval tasks."""
    answer_tokens: int = Field(default=128, ge=1, le=100_000)
    """Tokens an answer to a harmful or harmless request may have; 32 is fast and does not see a refusal that turns."""
    auroc: bool = True
    """Also measure how likely a refusal is, of harmful and harmless requests, without decoding."""
    judge: Judge | None = None
    """Another model that judges the answers to harmful requests; null: none."""
    seed: Seed = 0
    """Seed of everything random in the evaluation."""

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        for key in ("tasks", "compare"):
            values = getattr(self, key)
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f'{key} names "{twice}" twice; expected each once')
        return self


class Recipe(_Model):
    """A SafeMERGE recipe: which models, which tensors, how they merge, and what is written."""

    SCHEMA_ID: ClassVar[str] = "urn:safemerge-recipes:recipe:1"

    name: (
        Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\n\t]*$"), AfterValidator(_check_text)] | None
    ) = None
    """Name of the result, for the report and the model card."""
    description: Text | None = None
    """A few words about it."""
    sources: Sources
    """The models that are read."""
    gate: Gate
    """Which tensors are merged."""
    merge: Merge = Field(default_factory=Merge)
    """What a selected tensor becomes; `linear` with `alpha: 0.8` unless said."""
    rules: Annotated[tuple[Rule, ...], Field(strict=False, max_length=1000)] = ()
    """Exceptions; the first that matches a tensor wins."""
    vocabulary: Literal["finetuned", "aligned", "strict"] | None = None
    """Whose rows the embeddings and head get where vocabularies differ in size; `strict` refuses that.
    null: the fine-tuned side's, as its tokenizer is copied."""
    output: Output = Field(default_factory=Output)
    """What is written, and where; may be left to the command line."""
    evaluate: Evaluate | None = None
    """How the result is scored; null: not at all."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = _Problems([])
        for index, rule in enumerate(self.rules):
            try:
                _change_gate(self.gate, rule.gate)
            except ValidationError as errors:
                problems.add_all(("rules", index, "gate"), errors)
            try:
                _change_merge(self.merge, rule.merge)
            except ValidationError as errors:
                problems.add_all(("rules", index, "merge"), errors)
        problems.check("Recipe")

        given = self.sources.roles()
        asked: set[tuple[str, str]] = set()
        *ruled, default = self.policies()
        for policy in (default, *ruled):
            place = "" if policy.rule is None else f" (rules.{policy.rule})"
            never = policy.gate.selector[0] == "never"
            needs: list[tuple[Role, str]]
            if policy.keep is not None:
                needs = [(policy.keep, f"keep: {policy.keep}")]
            else:
                needs = [] if never else [(r, f"method {policy.merge.method}") for r in merge_sources(policy.merge)]
                if policy.gate.needs_metric:
                    needs.append(("base", f"metric {policy.gate.metric}"))
            for role, reason in needs:
                if role not in given and (role, reason) not in asked:
                    asked.add((role, reason))
                    problems.add(("sources", role), f"missing; expected it because {reason} needs it{place}")
            if self.output.format == "adapter" and policy.keep is None and not never and self.output.rank is None:
                method = policy.merge.method
                row = builtins.METHODS.get(method)
                if not (row and row.low_rank) and ("rank", method) not in asked:
                    asked.add(("rank", method))
                    message = f"missing; expected a rank because method {method} has no small exact rank{place}"
                    problems.add(("output", "rank"), message)
        for index, compared in enumerate(self.evaluate.compare if self.evaluate else ()):
            if compared not in given:
                message = f'found "{compared}"; expected one of the sources given: {", ".join(given)}'
                problems.add(("evaluate", "compare", index), message, compared)
        problems.check("Recipe")
        return self

    def policies(self) -> tuple[Policy, ...]:
        """What holds for each rule's tensors, in order, and last for all others. The first match wins."""
        return (
            *(
                Policy(
                    patterns=rule.tensors,
                    keep=rule.keep,
                    gate=_change_gate(self.gate, rule.gate),
                    merge=_change_merge(self.merge, rule.merge),
                    rule=index,
                )
                for index, rule in enumerate(self.rules)
            ),
            Policy(("*",), None, self.gate, self.merge, None),
        )


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file."""
    schema = Recipe.model_json_schema(by_alias=True)
    source = schema["$defs"]["Source"]
    text = {"type": "string", "description": "A local folder, a hub id, or id@revision."}
    schema["$defs"]["Source"] = {"anyOf": [text, source], "description": source["description"]}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": Recipe.SCHEMA_ID,
        "title": "SafeMERGE recipe",
    }
    return add_to_schema(head | {key: value for key, value in schema.items() if key not in head})
