"""How many may write at a time within a budget, and what each may use. Guards `planning.memory`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safemerge_recipes.errors import PlanError
from safemerge_recipes.planning.graph import task_memory
from safemerge_recipes.planning.memory import writers
from safemerge_recipes.storage.workers import SLACK, Resources
from tests.fixtures.plain_family import FULL, make_family, prepare_recipe, recipe_text

HELD = 100_000_000


def test_what_waits_to_be_sent_is_counted_once_for_each_that_writes(tmp_path: Path) -> None:
    make_family(tmp_path, torch.bfloat16)
    graph = prepare_recipe(tmp_path, recipe_text(FULL, "{always: true}", "{method: linear, alpha: 0.5}")).graph
    need = max(map(task_memory, graph.tasks))
    given = Resources(8, SLACK + 3 * (HELD + need), "cpu")
    assert writers(graph, 0, given) == (8, Resources(1, given.share, "cpu"))
    count, own = writers(graph, HELD, given)
    assert (count, own) == (3, Resources(1, given.memory // 3 - HELD, "cpu"))
    assert count * (HELD + need) + SLACK <= given.memory
    with pytest.raises(PlanError, match="--max-memory"):
        writers(graph, HELD, Resources(8, SLACK + HELD + need - 1, "cpu"))
