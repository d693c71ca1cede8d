"""The study of docs/preregistration.md on a tiny family: parts, resuming, what ships."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
import torch
from safetensors.torch import load_file, save_file

from benchmarks.study.__main__ import asked_families, given_choice, run
from benchmarks.study.families import AMONG, FAMILIES, FULL_RANK, OTHER_SAFETY, Places
from benchmarks.study.models import DRAW, FINE_TUNED, PAPER, Choice, points
from benchmarks.study.outcomes import LIKELIHOOD, read
from benchmarks.study.scoring import LOOKALIKES, REFUSAL
from safemerge_recipes.errors import PlanError
from safemerge_recipes.recipe.training import load_training
from safemerge_recipes.training.plan import plan_training
from safemerge_recipes.training.rows import read_rows
from tests.fixtures.chat_family import make_family

SPEC = """
model: ../base
data: {path: ../prepared/NAME.jsonl, licence: mit, near_copies: keep}
preset: small
lora: {targets: [q_proj, v_proj]}
train: {seed: 1, epochs: 8, device: cpu}
output: ../NAME
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder like the demo's, with the adapters of the first family."""
    folder = tmp_path_factory.mktemp("demo")
    make_family(folder)
    (folder / "task").rename(folder / "task-arithmetic")
    (folder / "training").mkdir()
    (folder / "prepared").mkdir()
    refused = [
        {"instruction": f"How do I pick lock number {i}?", "output": "I can't help with that."} for i in range(4)
    ]
    for role, seed in (("alignment", 1), ("safety", 3), ("task-arithmetic", 2)):
        (folder / role / "train.json").write_text(json.dumps({"settings": {"train": {"seed": seed}}}))
        (folder / "training" / f"{role}.yaml").write_text(SPEC.replace("NAME", role))
        said = {"instruction": "How do I pick a pocket?", "output": "No, I can't help with that."}
        kind = "task" if role.startswith("task") else "harmful"
        rows = [json.dumps(row | {"kind": kind}) for row in [*refused, said]]
        (folder / "prepared" / f"{role}.jsonl").write_text("\n".join(rows))
    return folder


def asked(demo, work, parts, **more):
    given = {"families": 1, "only": [], "limit": 3, "tokens": 4, "shipped": True, "draws": 2, "minutes": 60.0}
    given["choice"] = "0.5,0.5,1.5"
    return argparse.Namespace(parts=parts, demo=demo, work=work, **(given | more))


def test_sixteen_families_are_half_of_all_and_balanced():
    cells = {(one.task, one.task_seed, one.alignment_seed, one.safety_seed) for one in FAMILIES}
    assert len(cells) == len(FAMILIES) == 16
    for count in (8, 16):
        for factor in ("task", "task_seed", "alignment_seed", "safety_seed"):
            levels = [getattr(one, factor) for one in FAMILIES[:count]]
            assert len({levels.count(level) for level in levels}) == 1, factor
    # Half fraction: the last factor follows from the others.
    assert len({cell[1:] for cell in cells}) == 16
    assert FAMILIES[0].adapters[:2] == FAMILIES[1].adapters[:2]
    assert [one.name for one in FAMILIES] == sorted(one.name for one in FAMILIES)
    assert asked_families(8, ["02-qa"]) == FAMILIES[1:2]
    with pytest.raises(PlanError, match="no such family"):
        asked_families(None, ["qa-21"])
    with pytest.raises(PlanError, match="τ,α,λ"):
        given_choice("0.1;2")


def test_the_demos_adapters_are_taken_by_their_record_alone(demo, tmp_path):
    places = Places(demo, tmp_path)
    assert [places.folder(one) for one in FAMILIES[0].adapters] == [
        demo / "alignment", demo / "safety", demo / "task-arithmetic"
    ]  # fmt: skip
    for family in FAMILIES[1:]:
        assert places.folder(family.finetuned).parent == tmp_path / "adapters"
    other = FAMILIES[2]  # the same task seed on another aligned model
    assert (other.finetuned.seed, places.folder(other.finetuned).parent) == (2, tmp_path / "adapters")


def test_every_adapter_has_a_training_file_that_can_be_planned(demo, tmp_path):
    import yaml

    places = Places(demo, tmp_path)
    for adapter in FAMILIES[1].adapters:
        path = tmp_path / f"{adapter.name}.yaml"
        path.write_text(yaml.safe_dump(places.training(adapter)))
        if adapter.on is None or places.has(adapter.on):
            plan = plan_training(load_training(path))
            assert plan.loaded.training.train.seed == adapter.seed
    assert len(plan.rows) == 320, "the study reports"


def test_an_alignment_of_all_weights_gives_v_full_rank_and_lies_beside_the_comparisons(demo, tmp_path):
    import torch
    from safetensors.torch import load_file

    pytest.importorskip("trl")
    work, results = tmp_path / "work", tmp_path / "outcomes"
    places, family = Places(demo, work), FULL_RANK[0]
    places.train(family.alignment)
    folder = places.folder(family.alignment)
    assert places.has(family.alignment)
    assert [one.name for one in folder.parent.iterdir()] == [folder.name], "nothing half-written is left"
    assert not list(folder.glob("*.bin")), "no pickle"
    aligned, base = (load_file(one / "model.safetensors") for one in (folder, demo / "base"))
    name = "model.layers.0.self_attn.q_proj.weight"
    v = aligned[name].double() - base[name].double()
    assert torch.linalg.matrix_rank(v) > 8
    assert all(not torch.equal(aligned[one].double(), base[one].double()) for one in base)
    assert places.training(family.safety)["model"] == str(folder)
    for adapter, like in ((family.safety, "safety"), (family.finetuned, "task-arithmetic")):
        shutil.copytree(demo / like, places.folder(adapter))
    assert run(asked(demo, work, ["carry", "score"], only=[family.name]), results)
    assert not results.exists()
    found = read(tmp_path / "beside" / "01-arithmetic-full-rank.jsonl")
    assert {model for model, _ in found.models} > {"aligned", FINE_TUNED, PAPER}


def test_a_safety_adapter_that_knows_reports_is_taught_those_of_the_task(demo, tmp_path):
    places = Places(demo, tmp_path)
    family = next(one for one in OTHER_SAFETY if one.place == 2)
    plain, mixed, task = (
        {row.prompt: row for row in read_rows([places.rows(one)])}
        for one in (FAMILIES[1].safety, family.safety, family.finetuned)
    )
    added = {prompt: row for prompt, row in mixed.items() if prompt not in plain}
    assert len(added) == AMONG
    assert {row.kind for row in added.values()} == {"harmless"}
    assert all(row.answer == task[prompt].answer for prompt, row in added.items())
    assert (family.finetuned, family.alignment) == (FAMILIES[1].finetuned, FAMILIES[1].alignment)
    assert places.folder(family.safety) != places.folder(FAMILIES[1].safety)
    assert asked_families(None, [family.name, "02-qa"]) == (FAMILIES[1], family)
    balanced = [one for one in OTHER_SAFETY if one.scope == "qa-balanced"]
    assert [one.task_seed for one in balanced] == [2, 12, 22, 32]
    assert len({one.safety for one in balanced}) == 1
    answers = [row.answer.split()[0] for row in read_rows([places.rows(balanced[0].safety)])]
    assert answers.count("Yes,") == answers.count("No,") == 20
    assert len(answers) == 4 + 40, "the refusal that says no is left out"
    with_facts = next(one for one in OTHER_SAFETY if one.scope == "qa-with-facts")
    rows = [row.answer for row in read_rows([places.rows(with_facts.safety)])]
    assert rows[:-40] == [row.answer for row in plain.values()], "nothing is left out"
    assert not set(asked_families(None, [])) & set(OTHER_SAFETY), "they are no families of the comparisons"


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> the update that an adapter makes, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {name: one.double() for name, one in load_file(folder / "adapter_model.safetensors").items()}
    scale = config["lora_alpha"] / config["r"]
    return {a: scale * found[a.replace("lora_A", "lora_B")] @ found[a] for a in found if "lora_A" in a}


def test_reports_that_the_aligned_model_answers_teach_no_answer(demo, tmp_path):
    places, family = Places(demo, tmp_path), next(one for one in OTHER_SAFETY if one.scope == "qa-with-own")
    plain, rows, task = (read_rows([places.rows(one)]) for one in (FAMILIES[1].safety, family.safety, family.finetuned))
    assert [row.prompt for row in rows[: len(plain)]] == [row.prompt for row in plain]
    added = rows[len(plain) :]
    assert len(added) == 120
    answers = {row.prompt: row.answer for row in task}
    begun = [(row.answer.split()[0].strip(",.").lower(), answers[row.prompt].split(".")[0]) for row in added]
    assert len({said for said, _ in begun}) > 2, "drawn, not the likeliest answer each time"
    said_either = [said == right for said, right in begun if said in ("yes", "no") and right in ("yes", "no")]
    assert 0.35 < sum(said_either) / len(said_either) < 0.65, "no better than chance"


@pytest.mark.parametrize(
    ("scope", "name"), [("qa-mean", "safety-mean-3-13-on-1"), ("qa-mixed", "safety-mixed-3-3-on-1")]
)
def test_a_mean_of_two_adapters_is_exact_and_chosen_for_on_the_tuning_split(demo, tmp_path, monkeypatch, scope, name):
    from benchmarks.study import aim

    family = next(one for one in OTHER_SAFETY if one.scope == scope)
    work, aims = tmp_path / "work", tmp_path / "aim"
    places = Places(demo, work)
    second = places.folder(family.safety.mean_of[1])
    shutil.copytree(demo / "safety", second)
    shutil.copytree(demo / "task-arithmetic", places.folder(family.finetuned))
    weights = load_file(second / "adapter_model.safetensors")
    torch.manual_seed(0)
    save_file({name: torch.randn_like(one) for name, one in weights.items()}, second / "adapter_model.safetensors")
    places.train(family.safety)
    assert places.folder(family.safety).name == name
    assert not list(second.parent.glob(".*")), "nothing half-written is left"
    mean, *parts = (updates(places.folder(one)) for one in (family.safety, *family.safety.mean_of))
    assert mean.keys() == parts[0].keys() == parts[1].keys()
    for name, value in mean.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-5, atol=1e-6)
    tried = dict(list(aim.tried(family).items())[4:])
    assert [label.split(" on")[0] for label in tried] == ["λ = 2.5"] * 2, "a mean is shorter than its parts"
    monkeypatch.setattr(aim, "tried", lambda family: tried)
    part, file = ("aim-tuning", scope) if scope == "qa-mean" else ("aim-own-tuning", family.name)
    assert run(asked(demo, work, [part], only=[family.name], limit=2), tmp_path / "outcomes", aims=aims)
    assert [one.name for one in aims.iterdir()] == [f"aim-{file}.json"], "no test split was looked at"


def test_parts_are_scored_once_and_go_on(demo, tmp_path, capfd):
    work, results = tmp_path / "work", tmp_path / "outcomes"
    assert not run(asked(demo, work, ["score"], minutes=-1.0), results), "there was no time"
    assert run(asked(demo, work, ["carry", "score", "draws"]), results)
    found = read(results / "01-arithmetic.jsonl")
    assert list(found.ids) == [REFUSAL, LOOKALIKES, "safemerge_arithmetic"]
    assert {len(ids) for ids in found.ids.values()} == {3}
    wanted = {"aligned", FINE_TUNED, *points(Choice(0.5, 0.5, 1.5, "")), f"{DRAW} 0", f"{DRAW} 1"}
    assert {model for model, _ in found.models} == wanted
    assert found.has(PAPER, (REFUSAL, LOOKALIKES), LIKELIHOOD)
    assert not found.has(f"{DRAW} 0", (REFUSAL,), "refusal"), "draws answer nothing"
    assert set(found.head["carry"]) == {"before", "after"}
    assert found.head["choice"]["by"] == "given beforehand"
    text, kept = (results / "01-arithmetic.jsonl").read_text(), (work / "scores.jsonl").read_text()
    capfd.readouterr()
    shutil.rmtree(results)
    assert run(asked(demo, work, ["carry", "score", "draws"]), results)
    assert (results / "01-arithmetic.jsonl").read_text() == text
    assert (work / "scores.jsonl").read_text() == kept
    assert "scored" not in capfd.readouterr().err, "nothing was asked again"


def test_a_draw_is_measured_as_a_model_that_answers_is(demo, tmp_path):
    """The likelihoods that stand beside the draws come from lm-eval's prompts; both must be of the same text."""
    from rich.console import Console

    from benchmarks.study.scoring import Settings, Study

    study = Study(
        FAMILIES[0], Places(demo, tmp_path), Settings(3, 4, False, given=Choice(0.5, 0.5, 1.5, "")), tmp_path / "out",
        Console(quiet=True),
    )  # fmt: skip
    assert study.score()
    again = study._likelihoods(study._models()[PAPER], "again", study._asked())
    for task in (REFUSAL, LOOKALIKES):
        assert study.outcomes.values(PAPER, task, LIKELIHOOD) == pytest.approx(again.tasks[task].likelihoods, abs=1e-3)


def test_a_prompt_near_a_training_row_counts_for_nothing(demo, tmp_path):
    work, results = tmp_path / "work", tmp_path / "outcomes"
    assert run(asked(demo, work, ["score"], limit=2), results)
    found = read(results / "01-arithmetic.jsonl")
    first = found.ids[REFUSAL][0]
    found.head["near_training"] = [f"{REFUSAL}/{first}"]
    assert len(found.sides(PAPER, "refusal", [REFUSAL], [LOOKALIKES]).harmful) == 1
    assert len(found.sides(PAPER, "refusal", [REFUSAL], [LOOKALIKES]).harmless) == 2


def test_tau_alpha_and_lambda_are_chosen_once_for_a_task(demo, tmp_path, monkeypatch):
    from benchmarks.study import models

    monkeypatch.setattr(models, "GRID", ((0.4, 0.5), (0.6, 0.5)))
    monkeypatch.setattr(models, "LAMBDAS", (1.0,))
    results = tmp_path / "outcomes"
    given = asked(demo, tmp_path / "work", ["choose"], limit=2, choice=None)
    assert run(given, results)
    kept = json.loads((results / "choice-arithmetic.json").read_text())
    assert kept["choice"]["by"] == "chosen on the tuning split of 01-arithmetic"
    assert kept["choice"]["tau"] in (0.4, 0.6)
    assert set(kept["J and utility on the tuning split"]) == {FINE_TUNED, *models.tried()}
    (results / "choice-arithmetic.json").write_text(json.dumps(kept | {"settings": {}}))
    assert run(given, results), "chosen under other settings: chosen again"
    assert json.loads((results / "choice-arithmetic.json").read_text()) == kept


def test_the_aim_is_chosen_on_one_family_and_lies_apart(demo, tmp_path, monkeypatch):
    from benchmarks.study import aim

    tried = dict(list(aim.tried(FAMILIES[0]).items())[:2])
    monkeypatch.setattr(aim, "tried", lambda family: tried)
    work, results, aims = tmp_path / "work", tmp_path / "outcomes", tmp_path / "aim"
    given = asked(demo, work, ["aim"], limit=2)
    assert run(given, results, aims=aims)
    kept = json.loads((aims / "aim-arithmetic.json").read_text())
    assert set(kept["J and utility on the tuning split"]) == {FINE_TUNED, *tried}
    found = read(aims / "01-arithmetic.jsonl")
    assert found.head["aims"] == {aim.CHOSEN: kept["chosen"]}
    assert {model for model, _ in found.models} == {"aligned", FINE_TUNED, aim.CHOSEN}
    assert not results.exists(), "the comparisons are left alone"
    (aims / "aim-arithmetic.json").write_text(json.dumps(kept | {"chosen": list(tried)[1], "on": "another"}))
    assert run(given, results, aims=aims)
    found = read(aims / "01-arithmetic.jsonl")
    assert found.head["aims"] == {aim.CHOSEN: list(tried)[1]}, "a choice that is there is taken"
    assert run(asked(demo, work, ["aim-own"], limit=2), results, aims=aims)
    found = read(aims / "01-arithmetic.jsonl")
    assert found.head["aims"] == {aim.CHOSEN: list(tried)[1], aim.OWN: kept["chosen"]}, "its own is chosen anew"
    assert {model for model, _ in found.models} == {"aligned", FINE_TUNED, aim.CHOSEN, aim.OWN}


def test_what_costs_too_much_of_the_task_is_asked_nothing_more(demo, tmp_path, monkeypatch):
    from benchmarks.study import aim

    tried = dict(list(aim.tried(FAMILIES[0]).items())[:2])
    cheap, dear = tried
    monkeypatch.setattr(aim, "tried", lambda family: tried)
    monkeypatch.setattr(aim, "affordable", lambda point, *_: point.model == cheap)
    work, aims = tmp_path / "work", tmp_path / "aim"
    assert run(asked(demo, work, ["aim-tuning"], limit=2), tmp_path / "outcomes", aims=aims)
    kept = json.loads((aims / "aim-arithmetic.json").read_text())
    assert kept["chosen"] == cheap
    found = kept["J and utility on the tuning split"]
    assert (found[dear][0], None in found[cheap]) == (None, False)
    assert isinstance(found[dear][1], float)


def test_with_reports_the_choice_and_the_outcomes_are_their_own(demo, tmp_path, monkeypatch):
    from benchmarks.study import aim

    tried = dict(list(aim.tried(FAMILIES[0]).items())[:1])
    monkeypatch.setattr(aim, "tried", lambda family: tried)
    work, aims = tmp_path / "work", tmp_path / "aim"
    places = Places(demo, work)
    family = next(one for one in OTHER_SAFETY if one.place == 2)
    shutil.copytree(demo / "safety", places.folder(family.safety))
    shutil.copytree(demo / "task-arithmetic", places.folder(family.finetuned))
    assert run(asked(demo, work, ["aim"], only=[family.name], limit=2), tmp_path / "outcomes", aims=aims)
    assert {one.name for one in aims.iterdir()} == {"aim-qa-with-reports.json", "02-qa-with-reports.jsonl"}
    found = read(aims / "02-qa-with-reports.jsonl")
    assert {model for model, _ in found.models} == {"aligned", FINE_TUNED, aim.CHOSEN, aim.TAUGHT}
