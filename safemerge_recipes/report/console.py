"""A page on a rich console: at most 100 columns, no colour needed, ASCII where the output cannot hold more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

MAX_WIDTH = 100

_ASCII = str.maketrans(
    {
        "ρ": "rho", "₀": "0", "τ": "tau", "α": "alpha", "Δ": "D", "λ": "lambda", "γ": "gamma", "‖": "|",
        "−": "-", "–": "-", "…": "...", "≤": "<=", "≥": ">=", "●": "o", "│": "|", "─": "-", "┊": "!",
        "×": "x", "┄": "-", "\N{NO-BREAK SPACE}": " ",
    }
)  # fmt: skip


class Page:
    """Lines on a console: `words` are ours and may be styled, everything is literal text."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = max(40, min(console.width, MAX_WIDTH))
        self.plain = console.options.ascii_only

    def line(self, text: str = "", style: str = "") -> None:
        """One paragraph, wrapped to the page."""
        from rich.text import Text

        self.console.print(Text(self.fit(text), style=style, overflow="fold"), width=self.width, highlight=False)

    def marks(self, text: str, styles: Mapping[str, str]) -> None:
        """One line of a chart, each mark in its style."""
        from rich.text import Text

        line = Text(self.fit(text), no_wrap=True, overflow="crop")
        for mark, style in styles.items():
            line.highlight_words([self.fit(mark)], style)
        self.console.print(line, width=self.width, highlight=False)

    def fit(self, text: str) -> str:
        """The text in characters that the output can hold."""
        if not self.plain:
            return text
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def cut(text: str, width: int) -> str:
    """The end of a dotted name, cut at a dot where that fits: `…mlp.experts.up_proj`."""
    if len(text) <= width:
        return text
    end = text[len(text) - width + 1 :]
    at = end.find(".")
    return f"…{end[at + 1 :] if 0 <= at < len(end) - 1 else end}"
