"""`import safemerge_recipes`: the promised names, what they do, and what importing them costs.

Guards `planning.load`, `planning.prepared`, `engine.documents`, `engine.output`, `api.checking`, `api.experiments`,
`api.given`, `api.merging`, `api.recipes`, `api.scoring`, `api.training`.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import safemerge_recipes as sm
from safemerge_recipes import api
from safemerge_recipes.events import BytesDone, Event, PhaseStarted
from tests.fixtures.gated_family import ROLES, Family

FUNCTIONS = ("compare", "evaluate", "load_recipe", "plan", "run", "sweep", "verify")
ERRORS = ("CheckError", "PlanError", "ReadError", "RecipeError", "SafemergeError", "SourceError", "WriteError")


@pytest.fixture
def path(llama: Family, recipe: Any) -> Path:
    return recipe(sources={role: llama / role for role in ROLES}, gate={"tau": 0.5})


def test_the_names_are_exactly_those_promised() -> None:
    assert sorted(sm.__all__) == sorted(["__version__", "plugins", *ERRORS, *FUNCTIONS])
    assert set(sm.__all__) <= set(dir(sm))
    for name in ERRORS:
        assert issubclass(getattr(sm, name), sm.SafemergeError)
    with pytest.raises(AttributeError, match="frobnicate"):
        sm.frobnicate  # noqa: B018


def test_the_command_line_calls_what_the_api_offers() -> None:
    called = {
        name
        for path in (Path(api.__file__).parents[1] / "cli").glob("*.py")
        for name in re.findall(r"\bapi\.(\w+)", path.read_text())
    }
    assert called <= set(api.__all__)
    assert all(inspect.getdoc(getattr(api, name)) for name in api.__all__)


def test_importing_a_wing_takes_no_name_away() -> None:
    code = "import safemerge_recipes as sm, pkgutil, importlib\n"
    code += "import safemerge_recipes.evaluation.experiments.sweep, safemerge_recipes.verification.verify\n"
    code += f"assert all(callable(getattr(sm, name)) for name in {FUNCTIONS!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, safemerge_recipes as sm; sm.run, sm.plan, sm.SafemergeError; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("torch", "numpy", "transformers", "peft", "pydantic", "yaml", "rich", "typer"):
        assert f"'{name}'" not in loaded


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = getattr(sm, name)
    words = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(f"{one}: " in words for one in signature.parameters if one != "on_event"), words
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())
    assert "Raises:\n" in words


def test_a_recipe_becomes_a_plan_and_a_model(path: Path, tmp_path: Path, call: Any) -> None:
    told: list[Event] = []
    recipe = sm.load_recipe(path, {"gate.tau": 0.3, "gate.scope": ["*.mlp.*"]})
    assert recipe.recipe.gate.tau == 0.3
    plan = sm.plan(recipe, workers=1, on_event=told.append)
    begun = [one for one in told if isinstance(one, PhaseStarted)]
    assert [one.name for one in begun] == ["measure"]
    assert sum(one.nbytes for one in told if isinstance(one, BytesDone)) == begun[0].nbytes
    result = sm.run(plan, tmp_path / "one", on_event=told.append)
    assert [one.name for one in told if isinstance(one, PhaseStarted)] == ["measure", "write"]
    assert (result.output, result.plan) == (tmp_path / "one", plan)
    assert json.loads((tmp_path / "one" / "safemerge_plan.json").read_text()) == plan.plan_json()
    assert sm.verify(tmp_path / "one", deep=True)["recomputed"] == len(plan.plan.tensors)
    # The same bytes as the command line writes, and as a recipe gives that is not planned first.
    done = call("run", path, "-o", tmp_path / "two", "--set", "gate.tau=0.3", "--set", "gate.scope=['*.mlp.*']")
    assert done.code == 0
    whole = sm.run(recipe)
    assert whole.output == tmp_path / "out"
    assert whole.files == result.files
    for place in ("two", "out"):
        assert (tmp_path / place / "model.safetensors").read_bytes() == (
            tmp_path / "one" / "model.safetensors"
        ).read_bytes()


def test_what_goes_wrong_is_told_by_its_kind(path: Path, tmp_path: Path) -> None:
    with pytest.raises(sm.RecipeError, match=r"gate\.tau"):
        sm.load_recipe(path, {"gate.tau": "high"})
    with pytest.raises(sm.RecipeError, match=r"gate\.tua"):
        sm.load_recipe(path, ["gate.tua=1"])
    with pytest.raises(sm.RecipeError, match="--max-memory 1MB: too little"):
        sm.plan(path, max_memory="1MB")
    with pytest.raises(sm.PlanError, match="CUDA"):
        sm.plan(path, device="cuda:99")
    sm.run(path)
    with pytest.raises(sm.PlanError, match="finished output"):
        sm.run(path)
    assert sm.run(path, force=True).as_json()["summary"]["gated"] == 14
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(sm.CheckError, match=r"config\.json"):
        sm.verify(tmp_path / "out")


def test_the_type_hints_of_the_package_can_be_read() -> None:
    hints = typing.get_type_hints(api.verify)
    assert hints["return"] == dict[str, typing.Any]


def test_a_stored_recipe_keeps_what_a_rule_sets_to_nothing(llama: Family, recipe: Any, tmp_path: Path) -> None:
    rules = [{"tensors": "*.layers.1.*", "gate": {"scope": None}}]
    path = recipe(sources={role: llama / role for role in ROLES}, gate={"tau": 0.5, "scope": ["*q_proj*"]}, rules=rules)
    first = sm.run(path)
    assert first.plan.plan.summary()["gated"] == 1 + 7
    again = sm.plan(tmp_path / "out" / "safemerge_recipe.yaml")
    assert again.plan_json()["tensors"] == first.plan.plan_json()["tensors"]
