"""A plan in a notebook: sound markup, the counts of the plan, every tensor in the picture, no text as markup."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from safemerge_recipes.report.notebook import MAX_KINDS, plan_html


def plan(blocks: int = 3, kinds: tuple[str, ...] = ("mlp.up_proj", "mlp.down_proj"), **more: Any) -> dict[str, Any]:
    lines = []
    for block in range(blocks):
        for place, kind in enumerate(kinds):
            rho = (block + place + 1) / (blocks + len(kinds) + 1)
            lines.append({
                "name": f"model.layers.{block}.{kind}.weight", "shape": [4, 4], "dtype": "BF16", "metric": "rho",
                "value": rho, "rho": rho, "rho_null": 0.1, "action": "merge" if rho < 0.5 else "keep",
                "reason": "rho", "method": "linear", "alpha": 0.8,
            })  # fmt: skip
    lines.append({"name": "model.norm.weight", "shape": [4], "dtype": "BF16", "action": "keep", "reason": "no matrix"})
    recipe = {"name": "demo", "gate": {"metric": "rho", "tau": 0.5}, "merge": {"method": "linear"}}
    return {"recipe": recipe, "summary": {}, "warnings": [], "tensors": lines, **more}


def test_the_table_and_the_picture_are_the_plan() -> None:
    given = plan()
    root = ET.fromstring(plan_html(given))
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert rows[0] == ["module type", "merge", "gated", "ρ median", "ρ from", "to"]
    gated = [line for line in given["tensors"] if line.get("metric")]
    merged = sum(line["action"] == "merge" for line in gated)
    assert rows[-1][:3] == ["all", str(merged), str(len(gated))]
    assert [row[2] for row in rows[1:-1]] == ["3", "3"]
    dots = list(root.iter("circle"))
    assert len(dots) == len(gated)
    assert sum(dot.get("fill") == "currentColor" for dot in dots) == merged
    # Higher ρ is drawn higher.
    high = {dot.find("title").text.split(":")[0]: float(dot.get("cy", "nan")) for dot in dots}  # type: ignore[union-attr]
    drawn = sorted(gated, key=lambda line: -high[line["name"]])
    assert [line["rho"] for line in drawn] == sorted(line["rho"] for line in gated)
    dashed = [line for line in root.iter("line") if line.get("stroke-dasharray")]
    assert len(dashed) == 1


def test_without_rho_there_is_no_picture() -> None:
    given = plan()
    for line in given["tensors"]:
        line.update(rho=None, value=None)
    assert "<svg" not in plan_html(given)


def test_many_kinds_are_summed_up() -> None:
    kinds = tuple(f"kind{i}.proj" for i in range(MAX_KINDS + 5))
    root = ET.fromstring(plan_html(plan(1, kinds)))
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert len(rows) == MAX_KINDS + 3
    assert rows[-2][0] == "5 others"
    assert rows[-1][2] == str(MAX_KINDS + 5)


def test_text_from_outside_stays_text() -> None:
    given = plan(kinds=("<script>alert(1)</script>",), warnings=["<b onclick='x'>&"])
    given["recipe"]["name"] = "</div><script>x</script>"
    page = plan_html(given)
    assert "<script" not in page
    assert "onclick='" not in page
    assert "Warning: <b onclick" in "".join(ET.fromstring(page).itertext())
