"""The shipped evaluation tasks: where they lie and what they are called.

The folder is an lm-eval task folder: `lm-eval --include_path "$(python -m safemerge_recipes.evaluation.tasks)"` sees
the same tasks as `safemerge_recipes.evaluation.harness`. Importing this module imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent

# A plain name is the test split; the tuning split chooses thresholds and never appears in a result.
TASKS = ("safemerge_refusal", "safemerge_overrefusal", "safemerge_arithmetic", "safemerge_qa")
TUNING_TASKS = tuple(f"{name}_tuning" for name in TASKS)

# Their prompts are not shipped: `safemerge_recipes.evaluation.benchmarks` says where each is read from.
PUBLISHED_TASKS = tuple(
    f"safemerge_{name}"
    for name in (
        "advbench",
        "harmbench",
        "strongreject",
        "donotanswer",
        "directharm4",
        "hexphi",
        "sorrybench",
        "wildguardtest",
        "jailbreakbench",
        "xstest_unsafe",
        "xstest",
        "orbench",
        "wildguardtest_harmless",
        "jailbreakbench_benign",
        "pubmedqa",
    )
)

# Tags name several tasks at once, here and on lm-eval's own command line.
TAGS = {"safemerge": TASKS, "safemerge_tuning": TUNING_TASKS}


def benchmark_of(task: str) -> str:
    """The benchmark that a published task reads; see `safemerge_recipes.evaluation.benchmarks`."""
    return task.removeprefix("safemerge_")
