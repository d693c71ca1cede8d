"""What a user may say is written down: verbs, options, recipe keys, plugin groups, exit codes. Links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from safemerge_recipes import errors
from safemerge_recipes.cli import reference as commands
from safemerge_recipes.planning.plugins import KINDS
from safemerge_recipes.recipe import reference as recipes
from safemerge_recipes.recipe.model import json_schema

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/safemerge/safemerge-recipes/"
SKIPPED = {".venv", "node_modules", "out", "build", "dist"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not SKIPPED & set(path.relative_to(ROOT).parts) and not any(part.startswith(".") for part in path.parts[3:])
)
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the forge makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/README.md", "docs/architecture.md"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(prose(page)):
        target, _, anchor = link.partition("#")
        if target.startswith(HOME):
            target = re.sub(r"^(blob|tree|raw)/main/", "", target.removeprefix(HOME))
            found = ROOT / target
        elif re.match(r"[a-z]+:", target):
            continue
        else:
            found = page.parent / target if target else page
        assert found.exists() or target in ("", "issues"), f"{name} links to {link}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{name} links to {link}"


def test_the_readme_holds_no_relative_link_so_that_it_works_on_a_package_index() -> None:
    links = LINK.findall(prose(ROOT / "README.md"))
    assert not [link for link in links if not link.startswith(("https://", "#"))]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")} - {"README.md"}
    assert not {page for page in pages if f"({page})" not in index}


def test_the_reference_of_commands_is_fresh() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == commands.reference(), "run `make docs`"


def test_every_verb_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [verb for verb in commands.verbs() if f"`{verb}`" not in text and f"`safemerge {verb}`" not in text]


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{verb} {part.opts[0]}"
        for verb, command in commands.verbs().items()
        for part in command.params
        if not part.help
    ]
    assert not silent


def test_every_key_of_a_recipe_is_described() -> None:
    schema = json_schema()
    parts = {"": schema, **{f"{name}.": part for name, part in schema["$defs"].items()}}
    keys = [(place, key, part) for place, whole in parts.items() for key, part in whole.get("properties", {}).items()]
    assert len(keys) > 50
    assert not [place + key for place, key, part in keys if not part.get("description")]
    page = recipes.reference()
    assert not [place + key for place, key, _ in keys if f"`{key}`" not in page]


def test_every_exit_code_is_documented_as_the_errors_have_it() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SafemergeError)
    ]
    codes = {0} | {kind.exit_code for kind in kinds}
    assert codes == set(commands.exit_codes())
    readme = (ROOT / "README.md").read_text()
    told = readme[readme.index("Exit codes:") :]
    assert codes - {1} == {
        int(code) for code in re.findall(r"(?:^|· |: )(\d)(?= )", told.partition("\n\n")[0], flags=re.M)
    }


def test_every_group_of_plugins_is_documented() -> None:
    groups = {f"safemerge.{kind}" for kind in KINDS}
    text = (ROOT / "plugins" / "README.md").read_text()
    assert not {group for group in groups if f"`{group}`" not in text}
