"""`names_file`: as `names`, with the patterns of a file, which loading has read."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.named import named

NAMES_FILE = named()
