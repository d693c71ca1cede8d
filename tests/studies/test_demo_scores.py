"""README's table of the demo says what the shipped outcomes say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy")
from benchmarks.demo_scores import FILE, readme_sentence, readme_table, taken
from benchmarks.study.outcomes import read
from safemerge_recipes.evaluation.scores import Metric, Scores, TaskScores

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_says_what_the_outcomes_say() -> None:
    found = read(FILE)
    lines = README.read_text(encoding="utf-8").splitlines()
    for line in readme_table(found).splitlines():
        assert line in lines, "python -m benchmarks.demo_scores"
    assert readme_sentence(found) in " ".join(lines), "python -m benchmarks.demo_scores"


def test_the_outcomes_are_of_the_recipe_that_ships() -> None:
    yaml = pytest.importorskip("yaml")
    found = read(FILE)
    recipe = yaml.safe_load((FILE.parents[2] / "recipes" / "demo" / f"{found.head['recipe']}.yaml").read_text())
    asked = recipe["evaluate"]
    assert list(found.ids) == asked["tasks"]
    assert {len(ids) for ids in found.ids.values()} == {asked["limit"]} == {found.head["settings"]["limit"]}
    assert found.head["settings"]["answer_tokens"] == asked["answer_tokens"]
    assert {model for model, _ in found.models} == {"merged", *asked["compare"]}
    assert "answer" not in json.dumps([*found.models.values()])


def test_a_scored_output_gives_its_table() -> None:
    """Known rates in, the table's words out."""
    scores = {}
    for model, (harmful, harmless, right) in {
        "aligned": (8, 2, 0), "finetuned": (4, 0, 6), "merged": (9, 1, 5)
    }.items():  # fmt: skip
        tasks = {}
        for task, metric, hits in (
            ("safemerge_refusal", "refusal", harmful),
            ("safemerge_overrefusal", "refusal", harmless),
            ("safemerge_arithmetic", "acc", right),
        ):
            outcomes = {f"{task}-{i}": float(i < hits) for i in range(10)}
            likely = {key: -float(i) for i, key in enumerate(outcomes)} if metric == "refusal" else {}
            tasks[task] = TaskScores("1", {metric: Metric(hits / 10, None, 10, True, outcomes)}, {}, likely)
        scores[model] = Scores(model, tasks, {"limit": 10}, 1.0)
    found = taken(scores, "0" * 64)
    table = readme_table(found).splitlines()
    assert table[0] == "| n = 10 each, held out; 95 % intervals | aligned | fine-tuned on sums | merged |"
    assert [cell.split()[0] for cell in table[2].split(" | ")[1:]] == ["60.0", "**40.0**", "**80.0**"]
    assert [cell.split()[0] for cell in table[3].split(" | ")[1:]] == ["0.50"] * 3
    assert [cell.split()[0] for cell in table[6].split(" | ")[1:]] == ["0.0", "60.0", "50.0"]
    told = readme_sentence(found)
    assert "cost 20.0 points of J" in told
    assert "brought back 40.0" in told
    assert "and cost 10.0 points of sums" in told
