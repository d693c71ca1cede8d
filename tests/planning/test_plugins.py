"""One door for built-in and outside names: what is there, from where, and what goes wrong."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import get_args

import pytest

from safemerge_recipes import plugins
from safemerge_recipes.errors import RecipeError
from safemerge_recipes.gate.metrics import METRICS, BuiltinMetric
from safemerge_recipes.gate.selectors import SELECTORS, Selector
from safemerge_recipes.methods.base import Method
from safemerge_recipes.planning.plugins import BUILTIN, METHODS, read_registry
from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.loading import parse_recipe
from safemerge_recipes.recipe.model import SELECTORS as SELECTOR_KEYS
from tests.fixtures.plain_family import FULL, GATED, make_family, recipe_text, run_recipe
from tests.fixtures.program import finish, spawn

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path for path in (ROOT / "plugins").iterdir() if path.is_dir())


def installed(folder: Path, name: str, group: str, entries: dict[str, str], version: str = "1.0") -> list[EntryPoint]:
    """The entry points of a distribution whose metadata is installed in that folder."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = "".join(f"{key} = {target}\n" for key, target in entries.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    return [point for dist in distributions(path=[str(folder)]) for point in dist.entry_points]


def test_the_built_in_ones_come_through_the_same_door():
    registry = read_registry([])
    assert {name: registry.metrics[name] for name in registry.metrics} == dict(METRICS)
    assert {name: registry.selectors[name] for name in registry.selectors} == dict(SELECTORS)
    assert all(isinstance(registry.methods[name], Method) for name in registry.methods)
    assert list(METHODS) == list(builtins.METHODS)
    assert [*builtins.SELECTORS, "plugin"] == list(SELECTOR_KEYS)


@pytest.mark.parametrize(
    ("place", "kind", "listed"),
    [
        ("gate/metrics", BuiltinMetric, builtins.METRICS),
        ("gate/selectors", Selector, builtins.SELECTORS),
        ("methods", Method, builtins.METHODS),
    ],
)
def test_what_has_a_file_is_listed(place: str, kind: type, listed: builtins.Builtins) -> None:
    found = set()
    for path in (ROOT / "safemerge_recipes" / place).glob("[!_]*.py"):
        module = importlib.import_module(".".join(("safemerge_recipes", *place.split("/"), path.stem)))
        found |= {f"{module.__name__}:{name}" for name, value in vars(module).items() if isinstance(value, kind)}
    assert found == set(listed.targets.values())


@pytest.mark.parametrize("name", builtins.METHODS)
def test_a_method_is_listed_by_the_name_in_its_keys(name: str) -> None:
    assert get_args(builtins.METHODS[name].keys.model_fields["method"].annotation) == (name,)
    assert builtins.METHODS[name].formula


def test_a_recipe_imports_the_files_of_what_it_names_alone() -> None:
    recipe = {"sources": {"aligned": "a", "finetuned": "f", "safety": "s"}, "gate": {"always": True}}
    code = (
        f"import json, sys; from safemerge_recipes.recipe.model import Recipe; Recipe.model_validate({recipe!r}); "
        "print(json.dumps(list(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    kinds = (builtins.METRICS, builtins.SELECTORS, builtins.METHODS)
    listed = {target.partition(":")[0] for kind in kinds for target in kind.targets.values()}
    loaded = set(json.loads(found.stdout))
    wanted = ("gate.metrics.rho", "gate.selectors.always", "methods.linear")  # `rho` is what a gate has unsaid
    assert loaded & listed == {f"safemerge_recipes.{place}" for place in wanted}
    assert "torch" not in loaded


def test_the_distribution_lists_its_own_names_nowhere_else():
    assert "entry-points" not in (ROOT / "pyproject.toml").read_text()


def test_its_own_installed_metadata_is_no_duplicate(tmp_path):
    points = installed(tmp_path, "safemerge-recipes", "safemerge.metrics", dict(BUILTIN["metrics"]))
    assert read_registry(points).entries == read_registry([]).entries


def test_two_of_a_name_are_an_error_that_names_both(tmp_path):
    points = installed(tmp_path, "first-one", "safemerge.metrics", {"loud": "a:b"})
    points += installed(tmp_path / "x", "second-one", "safemerge.metrics", {"loud": "c:d"}, "2.1")
    with pytest.raises(
        RecipeError, match=r"'loud' is registered twice, by first-one 1\.0 \(a:b\) and by second-one 2\.1"
    ):
        read_registry(points)
    taken = installed(tmp_path / "y", "third", "safemerge.methods", {"linear": "x:Y"})
    with pytest.raises(
        RecipeError, match=r"'linear' is registered twice, by safemerge-recipes .* and by third 1\.0 \(x:Y\)"
    ):
        read_registry(taken)


def test_one_name_may_stand_for_different_kinds(tmp_path):
    points = installed(tmp_path, "one", "safemerge.metrics", {"linear": "a:b"})
    assert "linear" in read_registry(points).names("metrics")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:x", r"metric 'odd' of one 1\.0 \(no_such_module:x\): cannot be loaded: ModuleNotFoundError"),
        ("math:no_such_name", "cannot be loaded: AttributeError"),
        ("math:pi", r"is a float; expected a function of \(Moments, rank\)"),
    ],
)
def test_a_broken_plugin_is_named_when_it_is_asked_for_and_not_before(tmp_path, target, message):
    registry = read_registry(installed(tmp_path, "one", "safemerge.metrics", {"odd": target}))
    assert "odd" in registry.names("metrics")
    with pytest.raises(RecipeError, match=message):
        registry.metrics["odd"]


@pytest.mark.parametrize(("kind", "expected"), [("selectors", "Selector"), ("methods", "Method")])
def test_objects_of_another_kind_are_refused(tmp_path, kind, expected):
    registry = read_registry(installed(tmp_path, "one", f"safemerge.{kind}", {"odd": "math:cos"}))
    with pytest.raises(RecipeError, match=f"is a builtin_function_or_method; expected a .*{expected}"):
        getattr(registry, kind)["odd"]


def test_recipes_may_name_what_is_registered_and_nothing_else(tmp_path):
    registry = read_registry(installed(tmp_path, "one", "safemerge.metrics", {"loud": "a:b"}))
    known = {"metrics": registry.names("metrics"), "methods": registry.names("methods")}
    parse_recipe(recipe_text(FULL, "{metric: loud, tau: 7}", "{}"), **known)
    with pytest.raises(RecipeError, match=r'found "lout", an unknown metric; did you mean "loud"\?'):
        parse_recipe(recipe_text(FULL, "{metric: lout, tau: 7}", "{}"), **known)


def test_the_public_names_are_what_authors_need_and_come_when_asked_for():
    assert set(plugins.__all__) == set(plugins._HOME)
    assert {name for name in plugins.__all__ if getattr(plugins, name) is None} == set()
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        plugins.Nothing  # noqa: B018
    code = "import sys, safemerge_recipes.plugins; print(sorted(m for m in sys.modules if m.startswith('safemerge')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == str(["safemerge_recipes", "safemerge_recipes._version", "safemerge_recipes.plugins"])


def test_nothing_is_imported_by_reading_names():
    heavy = ("torch", "pydantic", "mergekit", "safemerge_recipes.gate.metrics")
    code = (
        "import sys; from safemerge_recipes.planning.plugins import read_registry; read_registry().names('methods'); "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


class TestPlugins:
    """The example plugins, as they would be installed: their module and their metadata on the path."""

    def environment(self, tmp_path: Path) -> dict[str, str]:
        paths = [str(ROOT)]
        for plugin in PLUGINS:
            text = (plugin / "pyproject.toml").read_text()
            ((group, name, target),) = re.findall(r'entry-points\."(.+)"\]\n(\w+) = "(.+)"', text)
            installed(tmp_path / plugin.name, plugin.name, group, {name: target}, "0.1.0")
            paths += [str(plugin), str(tmp_path / plugin.name)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SAFEMERGE_CACHE": str(tmp_path / "cache")}

    def run(self, tmp_path: Path, *arguments: str) -> str:
        environment = self.environment(tmp_path)
        before = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path[:0] = os.environ['PYTHONPATH'].split(':')"
        code, out, err = finish(spawn(*arguments, before=before, env=environment))
        assert code == 0, err
        return out

    def test_there_is_one_of_each_kind(self):
        assert len(PLUGINS) == 3

    @pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
    def test_it_imports_the_public_names_and_nothing_else(self, plugin):
        for path in plugin.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                own = {module for module in modules if module.partition(".")[0] == "safemerge_recipes"}
                assert own <= {"safemerge_recipes.plugins"}, path

    def test_their_own_tests_pass(self, tmp_path):
        tests = [str(plugin / "tests") for plugin in PLUGINS]
        options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull)
        command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(PLUGINS[0].parent), *tests]
        found = subprocess.run(command, capture_output=True, text=True, env=self.environment(tmp_path), check=False)
        assert found.returncode == 0, found.stdout + found.stderr
        assert all((plugin / "tests").is_dir() for plugin in PLUGINS)

    def test_the_command_lists_them_with_their_origin(self, tmp_path):
        rows = {(row["kind"], row["name"]): row for row in json.loads(self.run(tmp_path, "plugins", "--json"))}
        assert rows["metrics", "stable_rank"]["origin"] == "safemerge-example-metric 0.1.0"
        assert rows["selectors", "band"]["target"] == "safemerge_example_selector:BAND"
        assert rows["methods", "clip"]["origin"] == "safemerge-example-method 0.1.0"
        assert rows["metrics", "rho"]["origin"].startswith("safemerge-recipes ")

    def test_a_recipe_that_uses_all_three(self, tmp_path):
        family = make_family(tmp_path / "family")
        gate = "{metric: stable_rank, plugin: {name: band, options: {from: 0, to: 14}}}"
        merge = "{method: clip, options: {limit: 0.5}}"
        (tmp_path / "family" / "recipe.yaml").write_text(recipe_text(FULL, gate, merge))
        recipe = str(tmp_path / "family" / "recipe.yaml")
        plan = json.loads(self.run(tmp_path, "run", recipe, "--dry-run", "--json"))
        lines = {line["name"]: line for line in plan["tensors"] if line["name"] in GATED}
        for name, line in lines.items():
            v = family.v(name)
            stable = float(v.norm() ** 4 / (v.T @ v).norm() ** 2)
            assert line["value"] == pytest.approx(stable, rel=1e-4)
            assert line["action"] == ("merge" if stable <= 14 else "keep")
        assert {line["action"] for line in lines.values()} == {"merge", "keep"}
        self.run(tmp_path, "run", recipe, "--output", "merged", "--json")
        from safetensors.torch import load_file

        written = load_file(tmp_path / "merged" / "model.safetensors")
        name = next(name for name, line in lines.items() if line["action"] == "merge")
        delta = family.finetuned[name] - family.aligned[name]
        bound = 0.5 * float(delta.double().square().mean().sqrt())
        assert (written[name] - family.aligned[name] - delta.clamp(-bound, bound)).abs().max() < 1e-6


def test_a_plugins_version_is_part_of_what_names_a_result(tmp_path):
    """The engine may not take the result of one version for that of another."""
    from safemerge_recipes.planning.graph import build_graph
    from tests.fixtures.plain_family import prepare_recipe

    make_family(tmp_path)
    prepared = prepare_recipe(tmp_path, recipe_text(FULL, "{always: true}", "{method: slerp}"))
    graphs = [
        build_graph(prepared.plan, prepared.family, METHODS, lambda method, o=origin: o)
        for origin in ("plugin 1", "plugin 2", "plugin 2")
    ]
    keys = [{task.slot.name: task.key for task in graph.tasks} for graph in graphs]
    assert keys[1] == keys[2]
    assert all(keys[0][name] != keys[1][name] for name in GATED)


def test_a_run_needs_no_plugin(tmp_path):
    make_family(tmp_path)
    run_recipe(tmp_path, recipe_text(FULL, "{fraction: 0.5}", "{}"))
