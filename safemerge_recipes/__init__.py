"""Safety-restoring merges of language models, declared as recipes (SafeMERGE, arXiv 2503.17239)."""

from safemerge_recipes._version import __version__ as __version__
