"""What Python programs call; the command line is one of them.

    import safemerge_recipes as sm

    recipe = sm.load_recipe("recipe.yaml", {"gate.tau": 0.3})
    plan = sm.plan(recipe)
    result = sm.run(plan, "out")

Every function raises a `SafemergeError` of a kind that says which phase failed, with one message for people, and
prints nothing: what goes on is told to `on_event`, in events of `safemerge_recipes.events`. Nothing heavy is
imported before it is needed. `__init__` offers the promised names; the others serve the command line.
"""

from __future__ import annotations

from safemerge_recipes.api.checking import compiled, sign, verify
from safemerge_recipes.api.experiments import compare_recipes, probe, results_of, sweep, write_controls
from safemerge_recipes.api.given import is_recipe, load_recipe, target_of
from safemerge_recipes.api.masks import score
from safemerge_recipes.api.merging import plan, run
from safemerge_recipes.api.parts import finalize, run_part
from safemerge_recipes.api.publishing import publish
from safemerge_recipes.api.recipes import lock, registered, schema, show
from safemerge_recipes.api.scoring import compare, evaluate, judge, render
from safemerge_recipes.api.sharing import (
    first_recipe,
    import_mergekit,
    mergekit_yaml,
    shipped_recipe,
    shipped_recipes,
)
from safemerge_recipes.api.training import plan_training, prepare_safety_data, train_adapter

__all__ = [
    "compare",
    "compare_recipes",
    "compiled",
    "evaluate",
    "finalize",
    "first_recipe",
    "import_mergekit",
    "is_recipe",
    "judge",
    "load_recipe",
    "lock",
    "mergekit_yaml",
    "plan",
    "plan_training",
    "prepare_safety_data",
    "probe",
    "publish",
    "registered",
    "render",
    "results_of",
    "run",
    "run_part",
    "schema",
    "score",
    "shipped_recipe",
    "shipped_recipes",
    "show",
    "sign",
    "sweep",
    "target_of",
    "train_adapter",
    "verify",
    "write_controls",
]
