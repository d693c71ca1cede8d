"""The page of the study says what the outcomes say: known differences in, the right words out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("scipy")
from benchmarks.study.aim import (
    CHOSEN,
    OWN,
    PREFERRED,
    TAUGHT,
    aim_table,
    aimed,
    aims_met,
    aims_met_by_model,
    brought_back,
    by_answer,
    choices,
    summary,
)
from benchmarks.study.families import FAMILIES
from benchmarks.study.findings import beside, comparisons
from benchmarks.study.models import ALIGNED, DRAW, EVERYWHERE, FINE_TUNED, GATED, HALF, PAPER, UNIFORM, Choice
from benchmarks.study.outcomes import Outcomes, read
from benchmarks.study.page import carried_out, pages, read_families, write_pages
from safemerge_recipes.evaluation.tasks import studies

DOCS = Path(__file__).parents[2] / "docs"
TASKS = {"harmful": ["safemerge_refusal"], "harmless": ["safemerge_overrefusal"]}
LEVELS = {FINE_TUNED: 0.2, UNIFORM: 0.3, PAPER: 0.6, HALF: 0.7, GATED: 0.5, EVERYWHERE: 0.5}


def family(place: int, *, carry: float | None = 0.3, draws: int = 20, n: int = 100, **levels: float) -> Outcomes:
    """A family whose models refuse this share of harmful and a tenth of harmless requests."""
    draw = np.random.default_rng(place)
    its = FAMILIES[place]
    utility = f"safemerge_{its.task}"
    head = {"family": {**its.__dict__, "name": its.name}, "tasks": {**TASKS, "utility": utility}}
    head["settings"] = {"limit": None, "tokens": 128, "published": True}
    if carry is not None:
        head["carry"] = {"before": 0.1, "after": 0.1 + carry}
    found = Outcomes(head)
    every = [*TASKS["harmful"], *TASKS["harmless"], utility]
    found.ids = {task: [f"{task}-{i}" for i in range(n)] for task in every}
    base = {task: draw.random(n) for task in every}
    for model, level in (LEVELS | levels).items():
        for task, cut in zip(every, (level + 0.02 * draw.standard_normal(), 0.1, 0.4), strict=True):
            hits = (base[task] < cut).astype(int).tolist()
            if task == utility:
                found.models[model, task] = {"acc": hits}
            else:
                likely = (5 * (task == TASKS["harmful"][0]) * level + draw.standard_normal(n)).tolist()
                found.models[model, task] = {"refusal": hits, "degenerate": [0] * n, "likelihood": likely}
    for seed in range(draws):
        for task in every[:2]:
            likely = (2 * (task == TASKS["harmful"][0]) + draw.standard_normal(n)).tolist()
            found.models[f"{DRAW} {seed}", task] = {"likelihood": likely}
    return found


def text_of(*given) -> str:
    """All pages, one after the other, and the pictures."""
    return "\n".join(pages(given[0], DOCS / "evidence", *given[1:]).values())


def row(text: str, letter: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| **{letter}**"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_effects_that_are_there_are_found_and_those_that_are_not_are_not():
    text = comparisons([family(place) for place in range(8)])
    a, b, c, d = (row(text, letter) for letter in "ABCD")
    assert [one[0] for one in (a, b, c, d)] == ["8"] * 4
    assert (a[-1], b[-1], c[-1]) == ("**better**",) * 3
    assert float(a[1]) == pytest.approx(30, abs=4)
    assert float(c[1]) == pytest.approx(50, abs=4)
    assert float(a[4]) == pytest.approx(2 / 2**8, abs=1e-3)  # all eight of one sign
    assert "beats 100 % of the draws" in b[1]
    low, high = (float(one.replace("−", "-")) for one in re.findall(r"[+−][\d.]+", b[2]))
    assert 0 < low < float(re.findall(r"[+−][\d.]+", b[1])[0]) < high, "the draws separate less"
    assert d[-1] == "equivalent within 5 points"
    assert float(d[1].replace("−", "-")) == pytest.approx(0, abs=3)


def test_the_other_direction_is_called_worse():
    found = [family(place, **{PAPER: 0.1, UNIFORM: 0.5}) for place in range(8)]
    assert row(comparisons(found), "A")[-1] == "**worse**"


def test_a_safety_adapter_that_carries_nothing_counts_only_where_it_is_not_merged():
    found = [family(0), family(1, carry=0.05), family(2, carry=None), family(3)]
    text = comparisons(found)
    assert [row(text, letter)[0] for letter in "ABCD"] == ["2", "2", "2", "4"]
    told = carried_out(found)
    assert f"Failed the carry check, and left out of A, B and C: {FAMILIES[1].name}." in told
    assert f"Without a carry check, and left out of A, B and C: {FAMILIES[2].name}." in told
    assert "**failed**" in text_of(found)


def test_two_families_that_agree_are_called_neither_equivalent_nor_not_inferior():
    first, *others = [family(place) for place, one in enumerate(FAMILIES) if one.task == "arithmetic"][:3]
    for one in others:
        one.models = first.models
    found = [first, others[0]]
    assert row(comparisons(found), "D")[-1] == "not told apart"
    assert "| not shown |" in beside(found)
    assert "| yes |" not in beside(found)
    three = [first, *others]
    assert row(comparisons(three), "D")[-1] == "equivalent within 5 points"
    assert "| yes |" in beside(three)


def test_one_family_says_nothing_of_others_and_a_part_says_that_it_is_one():
    one = family(0, draws=3)
    one.head["settings"] = {"limit": 90, "tokens": 32, "published": False}
    page = text_of([one])
    assert row(page, "A")[-1] == "one family says nothing of others"
    told = " ".join(page.split())
    assert "1 of 16 families, the first 90 prompts of each task, the shipped prompts alone" in told
    assert "answers of 32 tokens, 3 random draws" in told
    assert row(comparisons([family(0), family(1, draws=19)]), "B")[0] == "1", "draws count when all of them are there"
    assert "this is a part of it" in told
    full = carried_out([family(place) for place in range(8)])
    assert "a part of it" not in full
    assert "cannot give a p below 0.00781" in full


def test_what_is_brought_back_is_held_against_the_aim():
    reports = next(place for place, one in enumerate(FAMILIES) if one.task == "qa")
    levels = {ALIGNED: 0.7, FINE_TUNED: 0.2}
    outcomes = [family(0, **levels, **{HALF: 0.68}), family(reports, **levels), family(2)]
    aims = [family(reports, **levels, **{CHOSEN: 0.4})]
    aims[0].head["aims"] = {CHOSEN: "λ = 2 on the lowest 50 %", OWN: "λ = 1.5 on the lowest 50 %"}
    outcomes[0].head["choice"] = Choice(0.1, 0.5, 1.0, "given").as_json()
    held = aimed(outcomes, aims)
    assert [model for _, model in held] == [HALF, CHOSEN], "a family without its aligned model is left out"
    assert brought_back(*held[0]) == pytest.approx(0.96, abs=0.08)
    first, second = aim_table(held).splitlines()[2:]
    assert "| λ = 1 on the lowest 50 % | 5" in first
    assert first.endswith("| met |")
    assert second.endswith("| missed |")
    assert aims_met(held) == "arithmetic 1 of 1; qa 0 of 1"
    assert brought_back(*held[1]) == pytest.approx(0.4, abs=0.15)
    assert f"qa: {100 * brought_back(*held[1]):.0f} % of the lost J" in summary(held)
    assert "one family, which says nothing of others" in summary(held)
    page = text_of(outcomes, aims)
    assert aim_table(held) in page
    chosen = aimed(outcomes, [*aims, family(0, **levels, **{CHOSEN: 0.5})])
    assert [model for _, model in chosen] == [CHOSEN, CHOSEN], "sums that were chosen for stand there once"
    both = aimed(outcomes, [family(reports, **levels, **{CHOSEN: 0.4, OWN: 0.6})])
    assert [model for _, model in both] == [HALF, CHOSEN, OWN]
    both[2][0].head["aims"] = aims[0].head["aims"]
    assert "| λ = 1.5 on the lowest 50 %, its own choice |" in aim_table(both)
    assert f"qa, chosen for each family: {100 * brought_back(*both[2]):.0f} % of the lost J" in summary(both)
    taught = family(reports, **levels, **{CHOSEN: 0.6, TAUGHT: 0.9})
    taught.head["family"]["name"] += "-balanced"
    taught.head["aims"] = aims[0].head["aims"]
    told = summary(aimed(outcomes, [*aims, taught]))
    assert f"qa-balanced: {100 * brought_back(taught, CHOSEN):.0f} % of the lost J" in told, "told apart from qa"
    assert "*balanced*" not in page
    name = taught.head["family"]["name"]
    alone = text_of(outcomes, [*aims, taught]).split("*balanced*")[1]
    assert re.search(rf"\| {name} \| 6\d \| [78]\d \|", alone), "the aligned model's J, and with Δs"
    skill = held[0][0].models[HALF, "safemerge_arithmetic"]["acc"]
    skill[:] = [0] * len(skill)
    assert aim_table(held).splitlines()[2].endswith("| missed |"), "all of the skill is lost"


def test_models_with_the_adapter_of_their_own_tuning_split_are_told_together():
    reports = next(place for place, one in enumerate(FAMILIES) if one.task == "qa")
    held = []
    for name, after in zip(PREFERRED, (0.75, 0.75, 0.3), strict=True):
        one = family(reports, **{ALIGNED: 0.7, FINE_TUNED: 0.2, OWN: after})
        one.head["family"] = one.head["family"] | {"name": name}
        held.append((one, OWN))
    assert aims_met_by_model(held).startswith("2 of 3 (01-qa-safety-13 ")
    assert aims_met_by_model(held[:2]) == "", "one of them is not scored"


def test_what_was_tried_is_told_also_where_no_j_was_asked_for(tmp_path: Path):
    assert choices(tmp_path) == ""
    tried = {"fine-tuned": [7.8, 98.9], "λ = 1": [36.7, 95.6], "λ = 2": [None, 74.4]}
    content = {"chosen": "λ = 1", "on": "02-qa", "J and utility on the tuning split": tried}
    (tmp_path / "aim-qa.json").write_text(json.dumps(content))
    assert choices(tmp_path).splitlines()[2:] == [
        "| qa | 02-qa | fine-tuned | 8 | 99 |",
        "| qa | 02-qa | **λ = 1** | 37 | 96 |",
        "| qa | 02-qa | λ = 2 | not asked | 74 |",
    ]


def test_lost_reports_are_told_by_their_answer():
    reports = next(place for place, one in enumerate(FAMILIES) if one.task == "qa")
    one = family(reports, **{CHOSEN: 0.5})
    one.head["aims"] = {CHOSEN: "λ = 2"}
    seeds = [seed for seed, _ in studies.studies("test", 9)]
    one.ids["safemerge_qa"] = [f"qa/{seed}" for seed in seeds]
    one.models[FINE_TUNED, "safemerge_qa"]["acc"] = [1] * 9
    # The answers stand in turn: yes, no, maybe.
    one.models[CHOSEN, "safemerge_qa"]["acc"] = [0, 1, 1, 0, 1, 0, 1, 1, 1]
    told = by_answer([(one, CHOSEN), (family(0), HALF)]).splitlines()
    assert told[2:] == [f"| {FAMILIES[reports].name} | λ = 2 | 100 → 33 | 100 → 100 | 100 → 67 |"], "and no sums"
    assert by_answer([(family(0), HALF)]) == ""


def test_outcomes_come_back_as_they_were_written(tmp_path: Path):
    found = family(0, n=5, draws=1)
    found.write(tmp_path / f"{FAMILIES[0].name}.jsonl")
    (back,) = read_families(tmp_path)
    assert back == read(tmp_path / f"{FAMILIES[0].name}.jsonl")
    assert (back.head, back.ids) == (found.head, found.ids)
    assert back.models == found.models


def test_the_page_is_made_from_the_outcomes_that_ship(tmp_path: Path):
    write_pages(DOCS / "evidence" / "outcomes", tmp_path, DOCS / "evidence" / "aim")
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5
    for path in written:
        assert (tmp_path / path).read_text() == (DOCS / path).read_text(), f"{path}: make study PART=report"


def test_what_came_out_is_one_screen_and_every_family_is_in_its_pictures():
    assert len((DOCS / "evidence.md").read_text().splitlines()) < 45
    found = [family(place) for place in range(4)]
    written = pages(found, DOCS / "evidence")
    assert "comparisons.svg" in written["evidence.md"]
    assert set(written) == {"evidence.md", "evidence/families.md", "evidence/comparisons.svg"}, "no aim was asked for"
    picture = ElementTree.fromstring(written["evidence/comparisons.svg"])
    titles = [str(one.text) for one in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3 * 4 * 4, "a mark for each comparison, quantity and family"
    mean = sum(float(one.split()[-1]) for one in titles if one.startswith("A") and ": J " in one) / 4
    assert mean == pytest.approx(float(row(written["evidence.md"], "A")[1].replace("−", "-")), abs=0.1)


def test_readme_says_what_came_out():
    told = " ".join((DOCS.parent / "README.md").read_text().split())
    found = comparisons(read_families(DOCS / "evidence" / "outcomes"))
    rows = {kind: row(found, kind) for kind in "ABC"}
    assert f"raised J by {float(rows['C'][1]):.0f} points" in told
    assert f"brought back {-float(rows['A'][1].replace('−', '-')):.0f} fewer" in told
    assert (rows["A"][-1], rows["B"][-1], rows["C"][-1]) == ("**worse**", "not told apart", "**better**")
    assert {rows["A"][0], rows["C"][0]} == {"8"}
    assert "of eight families" in told


def test_no_answer_and_no_path_ships():
    for path in [*(DOCS / "evidence" / "outcomes").glob("*.jsonl"), *(DOCS / "evidence" / "aim").glob("*")]:
        text = path.read_text()
        assert '"answer' not in text
        assert not re.search(r'"/(home|root|tmp|work|Users)', text)


def test_families_of_full_rank_are_told_one_by_one_beside_the_comparisons():
    full = family(0)
    full.head["family"]["name"] += "-full-rank"
    others = [family(place) for place in range(4)]
    page = text_of(others, (), [full])
    assert comparisons(others) in page, "they change nothing there"
    rows = [line for line in page.splitlines() if line.startswith("| 01-arithmetic-full-rank |")]
    assert [line.split("**")[1] for line in rows] == ["A", "C", "D"]
    assert float(rows[1].split("|")[3]) == pytest.approx(50, abs=6), "C, as the family was made"
    assert "<b>01-arithmetic-full-rank</b>" in page
    assert "V of full rank" not in text_of(others)
    del full.models[HALF, "safemerge_refusal"]
    begun = pages(others, DOCS / "evidence", (), [full])
    assert "V of full rank" not in begun["evidence.md"], "a family that is not scored yet is no reason to stop"
    assert "| **A**" in begun["evidence/families.md"]
