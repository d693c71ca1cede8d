"""The evidence page says what the results say."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.strips import strips
from benchmarks.study_page import ANCHORS, chance, findings, gains, write_page

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    shutil.copytree(DOCS / "evidence", folder)
    for picture in folder.glob("*.svg"):
        picture.unlink()
    write_page(folder, tmp_path / "evidence.md")
    assert (tmp_path / "evidence.md").read_text() == (DOCS / "evidence.md").read_text(), "run make study"
    for picture in folder.glob("*.svg"):
        assert picture.read_text() == (DOCS / "evidence" / picture.name).read_text()


def family(fine_tuned: float, merged: float, skill: float, kept: float, **more: object) -> dict[str, object]:
    def scores(refusal: float, acc: float) -> dict[str, object]:
        return {"safemerge_refusal": {"refusal": {"value": refusal}}, "safemerge_qa": {"acc": {"value": acc}}}

    models = {"aligned": scores(0.9, 0.3), "fine-tuned": scores(fine_tuned, skill), ANCHORS[0]: scores(merged, kept)}
    return {"family": "qa-1", "task": "qa", "scores": {"test": models, "tuning": {}}, "models": {}, **more}


@pytest.mark.parametrize(
    ("merged", "kept", "verdict"),
    [(0.86, 0.6, "met"), (0.84, 0.6, "missed"), (0.86, 0.57, "missed"), (0.95, 0.7, "met")],
)
def test_the_aim_needs_both_refusals_and_utility(merged: float, kept: float, verdict: str) -> None:
    results = family(0.4, merged, 0.6, kept)
    assert gains(results)[ANCHORS[0]] == pytest.approx(((merged - 0.4) / 0.5, 0.6 - kept))
    assert f"| qa-1 | {verdict} |" in findings([results])


def halved(picked: float, draws: list[float]) -> dict[str, object]:
    approaches = {"lowest half": "lowest half", **{f"random half, seed {i}": "random half" for i in range(len(draws))}}
    values = dict(zip(approaches, [picked, *draws], strict=True))
    tuning = {label: {"safemerge_refusal_tuning": {"refusal": {"value": v}}} for label, v in values.items()}
    models = {label: {"approach": approach} for label, approach in approaches.items()}
    return {"family": "qa-1", "models": models, "scores": {"tuning": tuning, "test": {}}}


def test_a_half_is_shown_to_beat_chance_only_where_it_is() -> None:
    draws = [i / 100 for i in range(30, 60)]
    assert chance([halved(0.7, draws)]).count("At least one half refuses more") == 1
    assert "is shown to refuse more" in chance([halved(0.5, draws)])
    # Five draws cannot show anything, however large the advantage.
    assert "is shown to refuse more" in chance([halved(1.0, draws[:5])])


def test_every_run_is_a_mark_in_the_picture() -> None:
    rows = {"a<b": [[("one", 90.0), ("two", 95.0)], [("one", -1.0)]], "c": [[("one", 10.0)], []]}
    picture = strips(rows, (("left", 90.0), ("right", 2.0)), "all")
    titles = [e.text for e in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["a<b, one: left 90.0", "a<b, two: left 95.0", "c, one: left 10.0", "a<b, one: right -1.0"]


def test_results_name_their_limits_and_models() -> None:
    for path in (DOCS / "evidence").glob("*.json"):
        results = json.loads(path.read_text())
        for split, models in results["scores"].items():
            for label, tasks in models.items():
                assert label in results["models"]
                for task, metrics in tasks.items():
                    limit = results["limits"][split][task.removesuffix("_tuning")]
                    assert all(limit is None or metric["n"] <= limit for metric in metrics.values())
