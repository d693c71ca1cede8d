"""Safety-restoring merges of language models, declared as recipes (SafeMERGE, arXiv 2503.17239)."""

__version__ = "0.1.0"
