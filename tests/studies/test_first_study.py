"""The first study's page says what the results say."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.first_study.chance import halves, together
from benchmarks.first_study.page import BEATEN, NOT_BEATEN, chance, findings, pick, probed, ranked_in, write_page
from benchmarks.first_study.results import ANCHORS, HALVES, PAPER, gains
from benchmarks.strips import strips
from benchmarks.study.page import AIM_PICTURE, PICTURE
from safemerge_recipes.evaluation.experiments.probe import correlations

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    shutil.copytree(DOCS / "evidence", folder)
    for picture in folder.rglob("*.svg"):
        picture.unlink()
    write_page(folder, tmp_path / "first-study.md")
    told = (DOCS / "first-study.md").read_text()
    assert (tmp_path / "first-study.md").read_text() == told, "run python -m benchmarks.first_study"
    made = {picture.relative_to(folder): picture.read_text() for picture in folder.rglob("*.svg")}
    kept = DOCS / "evidence"
    own = {picture for picture in kept.rglob("*.svg") if picture.name not in (PICTURE, AIM_PICTURE)}
    assert made == {picture.relative_to(kept): picture.read_text() for picture in own}


def test_the_paper_s_merge_brought_back_about_half() -> None:
    families = [json.loads(path.read_text()) for path in (DOCS / "evidence").glob("*.json")]
    paper = [gains(results)[PAPER][0] for results in families]
    assert 0.4 < sum(paper) / len(paper) < 0.6
    assert NOT_BEATEN in chance(families)


def family(fine_tuned: float, merged: float, skill: float, kept: float, **more: object) -> dict[str, object]:
    def scores(refusal: float, acc: float) -> dict[str, object]:
        return {"safemerge_refusal": {"refusal": {"value": refusal}}, "safemerge_qa": {"acc": {"value": acc}}}

    models = {"aligned": scores(0.9, 0.3), "fine-tuned": scores(fine_tuned, skill), ANCHORS[0]: scores(merged, kept)}
    return {"family": "qa-1", "task": "qa", "scores": {"test": models, "tuning": {}}, "models": {}, **more}


@pytest.mark.parametrize(("merged", "kept", "aim"), [(0.86, 0.6, 1), (0.84, 0.6, 0), (0.86, 0.57, 0), (0.95, 0.7, 1)])
def test_the_aim_needs_both_refusals_and_utility(merged: float, kept: float, aim: int) -> None:
    results = family(0.4, merged, 0.6, kept)
    assert gains(results)[ANCHORS[0]] == pytest.approx(((merged - 0.4) / 0.5, 0.6 - kept))
    assert f"meets the aim in {aim} of 1" in findings([results], {})


def test_the_tuning_split_picks_without_a_look_at_the_test_split() -> None:
    results = family(0.4, 0.9, 0.6, 0.6)
    models = {"fine-tuned": (0.4, 0.6), "safe": (0.8, 0.59), "safer, dearer": (0.9, 0.5), ANCHORS[0]: (0.7, 0.7)}
    tuning = {
        label: {"safemerge_refusal_tuning": {"refusal": {"value": a}}, "safemerge_qa_tuning": {"acc": {"value": b}}}
        for label, (a, b) in models.items()
    }
    results["scores"]["tuning"] = tuning
    assert pick(results) == "safe"
    del tuning["safe"], tuning[ANCHORS[0]]
    assert pick(results) == "safer, dearer"  # none is cheap enough: the largest sum


def halved(name: str, picked: float, draws: list[float], other: list[float]) -> dict[str, object]:
    values = {"lowest half, α = 0.5": picked, "lowest half within module type, α = 0.5": picked}
    for control, of_kind in zip(HALVES, (draws, other), strict=True):
        values |= {f"{control}, seed {i}": value for i, value in enumerate(of_kind)}
    tuning = {label: {"safemerge_refusal_tuning": {"refusal": {"value": v}}} for label, v in values.items()}
    return {"family": name, "task": "qa", "models": dict.fromkeys(values), "scores": {"tuning": tuning, "test": {}}}


def test_a_half_is_shown_to_beat_chance_only_where_it_is() -> None:
    draws = [i / 100 for i in range(30, 60)]
    assert BEATEN in chance([halved(name, 0.7, draws, draws) for name in ("qa-1", "qa-2")])
    assert NOT_BEATEN in chance([halved(name, 0.5, draws, draws) for name in ("qa-1", "qa-2")])
    # One family with five draws cannot show anything, however large the advantage, and the page says so.
    page = chance([halved("qa-1", 1.0, draws[:5], draws[:5])])
    assert NOT_BEATEN in page
    assert "every family would have 0.333" in page


def test_a_half_is_held_against_random_halves_of_its_own_kind() -> None:
    low, high = [0.1, 0.2, 0.3], [0.7, 0.8, 0.9]
    plain, within = halves([halved("qa-1", 0.5, low, high)])
    assert (plain.p("qa-1"), plain.advantage) == (0.25, pytest.approx(0.3))
    assert (within.p("qa-1"), within.advantage) == (1.0, pytest.approx(-0.3))


def test_the_combined_p_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for values in ([0.3], [0.04, 0.5], [1 / 11, 2 / 11, 1.0, 0.6, 0.01, 0.3]):
        assert together(values) == pytest.approx(stats.combine_pvalues(values).pvalue)


def probe_of(changes: list[float], rho: list[float], size: list[float]) -> dict[str, object]:
    rows = {
        f"block {i}": {"tensors": 7, "rho": a, "rho_ratio": a, "v_norm": b, "safety": c, "utility": 0.0}
        for i, (a, b, c) in enumerate(zip(rho, size, changes, strict=True))
    }
    base = {"safety": 0.5, "utility": 0.5}
    return {"by": "block", "merge_none": base, "groups": rows, "correlations": correlations(rows)}


def test_what_a_probe_shows_of_rho_is_held_against_mere_size() -> None:
    up = [i / 100 for i in range(12)]
    down, mixed = up[::-1], [up[5 * i % 12] for i in range(12)]
    page = probed({"a-block": probe_of(up, down, mixed), "b-block": probe_of(up, down, up)})
    assert "detected in 2 of 2 probes" in page
    assert "the opposite in 0; that simply a large ‖V‖ is where it helps, in 1." in page
    assert "a-block +" in page or "a-block -" in page
    only, both = ranked_in({"a": probe_of(up, down, mixed), "b": probe_of(up, down, up)})
    assert "size ranks it" not in only
    assert "size ranks it" in both
    assert "detected in 0 of 1 probes" in probed({"a": probe_of(mixed, down, mixed)})


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
