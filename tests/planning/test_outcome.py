"""A plan that repairs nothing, or chooses nothing, says so: on the terminal, in the plan, the report and the card.

Guards `planning.outcome`.
"""

from __future__ import annotations

import json

import pytest
import torch

from safemerge_recipes.errors import PlanError, SourceError
from tests.fixtures.plain_family import (
    ADAPTERS,
    FULL,
    GATED,
    make_family,
    prepare_recipe,
    random_factors,
    recipe_text,
    run_recipe,
    write_adapter,
    write_model,
)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = make_family(tmp_path_factory.mktemp("family"))
    for folder in ("base", "aligned", "finetuned", "safety"):
        (made.root / folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return made


def warnings(family, sources, gate, merge="{}"):
    return prepare_recipe(family.root, recipe_text(sources, gate, merge)).plan.warnings


def test_a_gate_that_merges_nothing_is_refused_with_the_range_and_what_to_try(family):
    with pytest.raises(PlanError, match=r"nothing is merged: 0 of 14 gated tensors; rho lies between") as told:
        run_recipe(family.root, recipe_text(FULL, "{tau: 0.0}", "{}"))
    values = sorted(t.value for t in prepare_recipe(family.root, recipe_text(FULL, "{tau: 0.0}", "{}")).plan.gated)
    for text in (
        f"between {values[0]:.3g} and {values[-1]:.3g}",
        f"a threshold above {values[0]:.3g}",
        "--allow-empty",
    ):
        assert text in str(told.value)
    with pytest.raises(PlanError, match=f"a threshold below {values[-1]:.3g}"):
        run_recipe(family.root, recipe_text(FULL, "{tau: 0.999, direction: above}", "{}"))


def test_to_merge_nothing_on_purpose_is_no_matter(family):
    prepared, written = run_recipe(family.root, recipe_text(FULL, "{never: true}", "{}"))
    assert prepared.plan.warnings == ()
    assert all(torch.equal(written[name], family.finetuned[name]) for name in GATED)
    # Nothing is merged, yet the output is another than the fine-tuned model.
    kept = 'rules: [{tensors: "*.mlp.*", keep: aligned}]'
    run_recipe(family.root, recipe_text(FULL, "{tau: 0.0}", "{}", kept))


def test_what_was_said_stands_in_every_document(family, tmp_path, capsys):
    from safemerge_recipes.cli.app import main

    (family.root / "said.yaml").write_text(recipe_text(FULL, "{tau: 0.0}", "{}"))
    arguments = ["run", str(family.root / "said.yaml"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 4
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--allow-empty"])
    assert end.value.code == 0
    text = "0 of 14 gated tensors"
    assert text in " ".join(capsys.readouterr().out.split())
    assert text in json.loads((tmp_path / "out" / "safemerge_plan.json").read_text())["warnings"][0]
    for name in ("safemerge_report.html", "README.md"):
        assert text in (tmp_path / "out" / name).read_text()


def test_a_gate_that_merges_everything_chose_nothing(family):
    said, null = warnings(family, FULL, "{tau: 1.0}")
    assert said.startswith("all 14 gated tensors are merged, so the gate chose nothing; rho lies between")
    assert null.startswith("ρ lies on ρ₀ in 14"), "these updates know nothing of V, and full ones tell it, too"
    assert warnings(family, FULL, "{always: true}") == ()
    assert warnings(family, FULL, "{fraction: 0.5}") == (null,)


def test_base_and_aligned_alike_wherever_the_gate_looks_is_an_error(family, tmp_path):
    same = FULL.replace("base: base", "base: aligned")
    write_model(tmp_path / "copy", family.aligned)
    for sources in (same, FULL.replace("base: base", f"base: {tmp_path / 'copy'}")):
        with pytest.raises(SourceError, match="V is zero in all 14 gated tensors"):
            warnings(family, sources, "{tau: 0.5}")
    write_model(tmp_path / "nearly", {**family.aligned, GATED[3]: family.base[GATED[3]]})
    assert warnings(family, FULL.replace("base: base", f"base: {tmp_path / 'nearly'}"), "{lowest: 1}") == ()


def test_an_adapter_that_was_never_trained_is_named_as_such(family, tmp_path):
    still = {module: (a, torch.zeros_like(b)) for module, (a, b) in random_factors(5, 4).items()}
    write_adapter(tmp_path / "still", still, 8)
    sources = ADAPTERS.replace("finetuned-adapter", str(tmp_path / "still"))
    with pytest.raises(PlanError, match=r"the fine-tuned update is zero in all 14 gated tensors .* sources\.finetuned"):
        run_recipe(family.root, recipe_text(sources, "{tau: 0.5}", "{}"))


def test_a_safety_side_that_is_the_finetuned_one_is_told(family, tmp_path):
    text = "sources.safety and sources.finetuned are the same files"
    assert text in warnings(family, FULL.replace("safety: safety", "safety: finetuned"), "{fraction: 0.5}")[0]
    write_adapter(tmp_path / "copy", family.finetuned_factors, 8)
    copied = ADAPTERS.replace("safety-adapter", str(tmp_path / "copy"))
    assert any(text in one for one in warnings(family, copied, "{fraction: 0.5}"))
    assert not any(text in one for one in warnings(family, ADAPTERS, "{fraction: 0.5}"))


def test_updates_that_know_nothing_of_v_lie_on_the_null(tmp_path):
    # V and the update are both random here, as nothing was trained: z is standard normal.
    made = make_family(tmp_path)
    write_adapter(tmp_path / "alignment", random_factors(9, 6), 6)
    sources = "{base: base, aligned: {adapter: alignment, on: base}, finetuned: {adapter: finetuned-adapter}}"
    said = warnings(made, sources, "{fraction: 0.5}", "{method: drop}")
    assert any(one.startswith("ρ lies on ρ₀ in 1") and "safemerge controls" in one for one in said)
    # An update made of V's own directions lies far above it.
    own = {module: (random_factors(3, 4)[module][0], b[:, :4]) for module, (_, b) in random_factors(9, 6).items()}
    write_adapter(tmp_path / "along", own, 8)
    along = sources.replace("finetuned-adapter", "along")
    assert not any("ρ lies on ρ₀" in one for one in warnings(made, along, "{fraction: 0.5}", "{method: drop}"))
