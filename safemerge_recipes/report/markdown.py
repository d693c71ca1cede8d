"""Outside text in Markdown: read literally in a paragraph, a table cell, a piece or a block of code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from safemerge_recipes.text import clean, clean_lines

_MARKUP = re.compile(r"[\\`*{}\[\]<>|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown, HTML, tables, mathematics, mentions or automatic links could read as markup in a line."""
_LINE_START = re.compile(r"[-+=#:]|[0-9]+(?=[.)](\s|$))")


def markdown(value: object, limit: int = 300) -> str:
    """Outside text, to be read literally in a Markdown paragraph, heading or table cell."""
    told = _MARKUP.sub(_entity, clean(value, limit).strip())
    start = _LINE_START.match(told)
    if start is None:
        return told
    # What would begin a list, a heading or a rule; a number keeps its digits.
    mark = f"{start[0]}\\" if start[0].isdigit() else _entity(start)
    return mark + told[start.end() :]


def _entity(found: re.Match[str]) -> str:
    named = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return named.get(found[0]) or f"&#{ord(found[0])};"


def code(value: object, limit: int = 300) -> str:
    """Outside text as code, in a table cell too: no character of it ends the code or the cell."""
    told = clean(value, limit).strip()
    if not told:
        return "–"
    ticks = "`" * (_longest_run(told) + 1)
    room = " " if told.startswith("`") or told.endswith("`") else ""
    return f"{ticks}{room}{told}{room}{ticks}".replace("|", "\\|")


def fenced(value: object, language: str) -> str:
    """Outside text of several lines as a block of code: no line of it ends the block."""
    told = clean_lines(value).strip("\n")
    fence = "`" * max(3, _longest_run(told) + 1)
    return f"{fence}{language}\n{told}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """A Markdown table; columns from `right` on are aligned right. Cells are Markdown already."""
    rule = ["---:" if index >= right else "---" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))
