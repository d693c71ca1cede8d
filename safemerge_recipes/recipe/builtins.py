"""The built-in metrics, selectors and merge methods: the only list that names them, and where each lies.

All else that is to be known of one stands in its file: a method's keys, the sources it needs, its formula and link; the
bounds of a metric's thresholds. A recipe finds them by name, as it finds those of plugins, and so imports the files of
those that it names and of no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

Role = str
"""What a source is to a recipe: one of `ROLES`, or the name of one of its `others`."""
ROLES: tuple[Role, ...] = ("base", "aligned", "finetuned", "safety")


class Builtins(Mapping[str, Any]):
    """The built-in objects of one kind by name; each is imported when it is asked for.

    Attributes:
        targets: where each lies, `module:attribute`.
    """

    def __init__(self, place: str, targets: Mapping[str, str]) -> None:
        self.targets = {name: f"safemerge_recipes.{place}.{target}" for name, target in targets.items()}

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self.targets[name].partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self.targets

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)


METRICS = Builtins(
    "gate.metrics",
    {
        "rho": "rho:rho",
        "rho_ratio": "rho_ratio:rho_ratio",
        "cosine": "cosine:cosine",
        "residual": "residual:residual",
        "norm_ratio": "norm_ratio:norm_ratio",
        "e_diem": "e_diem:e_diem",
    },
)
"""The built-in metrics (`gate.metrics.BuiltinMetric`), by name."""

SELECTORS = Builtins(
    "gate.selectors",
    {
        "tau": "tau:TAU",
        "at_most": "at_most:AT_MOST",
        "lowest": "lowest:LOWEST",
        "fraction": "fraction:FRACTION",
        "random": "random:RANDOM",
        "complement": "complement:COMPLEMENT",
        "names": "names:NAMES",
        "names_file": "names_file:NAMES_FILE",
        "always": "always:ALWAYS",
        "never": "never:NEVER",
    },
)
"""The built-in selectors (`gate.selectors.Selector`), by their key in a gate."""

METHODS = Builtins(
    "methods",
    {
        "linear": "linear:LINEAR",
        "slerp": "slerp:SLERP",
        "ties": "ties:TIES",
        "dare_linear": "dare_linear:DARE_LINEAR",
        "dare_ties": "dare_ties:DARE_TIES",
        "task_arithmetic": "task_arithmetic:TASK_ARITHMETIC",
        "project": "project:PROJECT",
        "add_safety_vector": "add_safety_vector:ADD_SAFETY_VECTOR",
        "svd_k": "svd_k:SVD_K",
        "mask": "mask:MASK",
        "replace": "replace:REPLACE",
        "drop": "drop:DROP",
        "iso_c": "iso_c:ISO_C",
        "tsv": "tsv:TSV",
        "project_rows": "project_rows:PROJECT_ROWS",
    },
)
"""The built-in merge methods (`methods.base.Method`), by name."""
