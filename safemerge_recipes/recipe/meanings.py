"""What the keys of a recipe mean: the docstrings under the fields of its models, read when they are wanted.

pydantic can read them when a class is made, which takes a tenth of a start and serves the schema and messages alone.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache


def field_docstrings(model: type) -> dict[str, str]:
    """Field -> the text under it, of a class and those it is made of; empty where there is no source to read."""
    found: dict[str, str] = {}
    for part in reversed(model.__mro__):
        if "__annotations__" in vars(part) and part.__module__.startswith("safemerge_recipes."):
            found |= _own(part)
    return found


def _own(part: type) -> dict[str, str]:
    return _in_module(part.__module__).get(part.__qualname__, {})


@cache
def _in_module(name: str) -> dict[str, dict[str, str]]:
    """Class -> its fields' texts; a module's source never changes while it is loaded."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[name]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {part.name: _texts(part) for part in tree.body if isinstance(part, ast.ClassDef)}


def _texts(part: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, text in zip(part.body, part.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            value = getattr(text.value, "value", None)
            if isinstance(value, str):
                found[field.target.id] = inspect.cleandoc(value)
    return found
