"""Each module of the package is named by a test: one that imports it, or whose docstring says `Guards …`.

A module that only whole runs exercise is named in the docstring of the test that would notice if it were wrong.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "safemerge_recipes"
FROM = re.compile(r"from (safemerge_recipes[\w.]*) import (\([^)]*\)|[^\n;\"']*)")
GUARDS = re.compile(r"^Guards ([`\w., \n]+)\.$", flags=re.M)
PLAIN = re.compile(r"(?:import|-m\"?,? ?\"?) ?(safemerge_recipes[\w.]*)|\"(safemerge_recipes[\w.]*)\"")


def modules() -> set[str]:
    """Every module of the package that holds a definition."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if re.search(r"^(def|class|async def|[A-Z_]+(:.*)? =)", text, flags=re.M):
            found.add(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return found


def named(text: str) -> set[str]:
    """The modules, and what might be one, that a test names."""
    found = {name for pair in PLAIN.findall(text) for name in pair if name}
    docstring = ast.get_docstring(ast.parse(text)) or ""
    guarded = re.findall(r"`([\w.]+)`", " ".join(GUARDS.findall(docstring)))
    assert not {name for name in guarded if not list(PACKAGE.glob(name.replace(".", "/") + "*"))}, "guards what is gone"
    found |= {f"safemerge_recipes.{name}" for name in guarded}
    for module, names in FROM.findall(text):
        found.add(module)
        found |= {f"{module}.{name.split(' as ')[0].strip()}" for name in names.strip("()").split(",")}
    return found


def test_each_module_is_named_by_a_test() -> None:
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    tests += [path.read_text() for path in (ROOT / "plugins").rglob("test_*.py")]
    missing = modules() - set().union(*map(named, tests))
    assert not missing, f"no test imports or guards {', '.join(sorted(missing))}"
