"""What the built-in merge methods are called and where each comes from: plain data, so that reports may read it."""

from __future__ import annotations

from collections.abc import Mapping

LINKS: Mapping[str, str] = {
    "linear": "https://arxiv.org/abs/2503.17239",
    "slerp": "https://en.wikipedia.org/wiki/Slerp",
    "ties": "https://arxiv.org/abs/2306.01708",
    "dare_linear": "https://arxiv.org/abs/2311.03099",
    "dare_ties": "https://arxiv.org/abs/2311.03099",
    "task_arithmetic": "https://arxiv.org/abs/2212.04089",
    "add_safety_vector": "https://arxiv.org/abs/2402.11746",
    "project": "https://arxiv.org/abs/2405.16833",
}
"""Where each method comes from; carried into the report and the model card."""
