"""Sweeps and probes: grids, choices, controls, the bench and what is drawn of them.

Guards `cli.experiments`, `evaluation.experiments.recipes`.
"""

import io
import itertools
import json
import re
import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
from safemerge_recipes import api
from safemerge_recipes.cli import app as cli
from safemerge_recipes.errors import CheckError, RecipeError
from safemerge_recipes.evaluation.experiments import controls
from safemerge_recipes.evaluation.experiments.measures import measures, tuning
from safemerge_recipes.evaluation.experiments.probe import correlations, equal_gammas, groups
from safemerge_recipes.evaluation.experiments.sweep import affordable, choose, parse_grid
from safemerge_recipes.evaluation.experiments.workbench import Bench
from safemerge_recipes.evaluation.harness import evaluate
from safemerge_recipes.evaluation.rates import spearman
from safemerge_recipes.evaluation.scores import Metric, Scores, TaskScores
from safemerge_recipes.events import Note
from safemerge_recipes.planning.load import load
from safemerge_recipes.recipe.loading import load_recipe
from safemerge_recipes.report.scatter import Mark, front, scatter
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.tensor_names import module_type
from tests.fixtures.chat_family import make_family


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def open_bench(recipe, store, *overrides):
    """A bench that keeps what is said in its `told`."""
    told = []
    bench = Bench(load(recipe, overrides), store, Resources(1, 1 << 28), told.append)
    bench.told = told
    return bench


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    assert end.value.code == code


# Grids and choices


def test_a_grid_is_every_combination():
    grid = parse_grid(["gate.tau=0.1,0.2", "merge.alpha=0.5, 0.8"])
    assert grid == list(itertools.product(["gate.tau=0.1", "gate.tau=0.2"], ["merge.alpha=0.5", "merge.alpha=0.8"]))
    assert parse_grid(["gate.random={count: 3, seed: 1},{count: 3, seed: 2}", "a=[1,2],[3]"]) == [
        ("gate.random={count: 3, seed: 1}", "a=[1,2]"),
        ("gate.random={count: 3, seed: 1}", "a=[3]"),
        ("gate.random={count: 3, seed: 2}", "a=[1,2]"),
        ("gate.random={count: 3, seed: 2}", "a=[3]"),
    ]
    for broken in ("gate.tau", "=1", "gate.tau=1,,2", "gate.tau="):
        with pytest.raises(RecipeError, match="not an axis"):
            parse_grid([broken])


def point(harmful, harmless, useful, n=200):
    """Scores of a model that refuses so many harmful and harmless requests of n and solves so many sums."""

    def metric(count, better):
        outcomes = {str(i): float(i < count) for i in range(n)}
        return Metric(count / n, None, n, better, outcomes)

    tasks = {
        "h": TaskScores("1", {"refusal": metric(harmful, True)}),
        "s": TaskScores("1", {"refusal": metric(harmless, False)}),
        "u": TaskScores("1", {"acc": metric(useful, True)}),
    }
    return Scores("m", tasks, {}, 0.0)


BETTER = {"h": {"refusal": True}, "s": {"refusal": False}, "u": {"acc": True}}


def test_the_choice_separates_best_and_loses_little():
    by, tuned = measures(BETTER, ["h", "s", "u"]), point(60, 6, 100)
    points = {"a": point(100, 6, 100), "b": point(160, 10, 99), "c": point(190, 4, 70)}
    assert choose(points, tuned, by, 0.02) == "b"
    assert choose(points, tuned, by, 0.20) == "c"
    # Who refuses everything separates nothing.
    assert choose({**points, "all": point(200, 200, 100)}, tuned, by, 0.02) == "b"
    # None is good enough: the largest sum.
    assert choose({"d": point(150, 4, 40), "e": point(150, 4, 60)}, tuned, by, 0.02) == "e"


def test_what_loses_too_much_utility_is_known_before_its_safety_is():
    by, tuned = measures(BETTER, ["h", "s", "u"]), point(60, 6, 100)
    alone = [Scores("m", {"u": point(0, 0, useful).tasks["u"]}, {}, 0.0) for useful in (99, 90, 40)]
    assert [affordable(one, tuned, by, 0.02) for one in alone] == [True, False, False]
    assert affordable(alone[1], tuned, by, 0.05)


def test_a_prompt_or_two_decide_nothing():
    by, tuned = measures(BETTER, ["h", "s", "u"]), point(60, 6, 100)
    # One more refusal against eight more sums; one more sum against thirty more refusals.
    assert choose({"safe": point(151, 6, 99), "useful": point(150, 6, 107)}, tuned, by, 0.02) == "useful"
    assert choose({"safe": point(150, 6, 100), "useful": point(120, 6, 101)}, tuned, by, 0.02) == "safe"
    # A loss of one prompt more than allowed is no reason to leave a point out.
    assert choose({"safe": point(190, 6, 95), "useful": point(80, 6, 100)}, tuned, by, 0.02) == "safe"
    # The same in all: fewest tensors.
    same = {"many": point(150, 6, 100), "few": point(150, 6, 100)}
    assert choose(same, tuned, by, 0.02, {"many": 90, "few": 20}) == "few"


def test_without_harmless_requests_refusals_alone_count():
    by = measures(BETTER, ["h", "u"])
    assert by.words == "refusal of harmful requests"
    assert "safemerge_overrefusal" in (by.caution or "")
    assert by.of(point(150, 200, 100)) == (0.75, 0.5)
    assert by.changes(point(150, 0, 100), point(100, 0, 100))[0][0] == pytest.approx(0.25)
    assert measures(BETTER, ["h", "s", "u"]).of(point(150, 50, 100)) == (0.5, 0.5)


def test_tuning_splits():
    assert tuning(["safemerge_refusal", "safemerge_qa_tuning"]) == ["safemerge_refusal_tuning", "safemerge_qa_tuning"]
    with pytest.raises(CheckError, match="gsm8k: has no tuning split"):
        tuning(["gsm8k"])


# Controls


@pytest.fixture(scope="module")
def gate_plan(recipe, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_bench(recipe, tmp_path_factory.mktemp("store") / "s.jsonl").plan(("gate.fraction=0.3",))


def per_type(names):
    return sorted(module_type(name) for name in names)


def test_controls_keep_the_count_and_change_nothing_but_the_choice(recipe, gate_plan, tmp_path):
    gate, everything = controls.merged(gate_plan), set(controls.choosable(gate_plan))
    assert len(gate) == 2
    assert len(everything) == 6
    bench = open_bench(recipe, tmp_path / "s.jsonl")
    known = controls.controls(40)
    found = {one.label: bench.control(gate_plan, one) for one in known}
    assert controls.merged(found["complement"]) == everything - gate
    assert controls.merged(found["merge all"]) == everything
    assert controls.merged(found["merge none"]) == frozenset()
    free = [controls.merged(found[f"random {seed}"]) for seed in range(40)]
    typed = [controls.merged(found[f"random per module {seed}"]) for seed in range(40)]
    assert {len(one) for one in free} == {2}
    assert all(per_type(one) == per_type(gate) for one in typed)
    # All 15 pairs have a chance; 40 draws show most of them.
    assert len(set(free)) > 8
    for plan in found.values():
        for before, after in zip(gate_plan.tensors, plan.tensors, strict=True):
            assert (before.name, before.gated, before.take) == (after.name, after.gated, after.take)
            assert (before.policy and before.policy.merge) == (after.policy and after.policy.merge)
    again = {one.label: bench.control(gate_plan, one) for one in controls.controls(40)}
    assert {label: controls.merged(plan) for label, plan in found.items()} == {
        label: controls.merged(plan) for label, plan in again.items()
    }
    with pytest.raises(ValueError, match="not gated"):
        controls.with_merged(gate_plan, ["model.norm.weight"], "x")


def test_the_drawn_controls_are_those_of_earlier_versions(recipe, gate_plan, tmp_path):
    import random

    bench, gate, all_ = (
        open_bench(recipe, tmp_path / "s.jsonl"),
        controls.merged(gate_plan),
        controls.choosable(gate_plan),
    )
    for seed in range(5):
        names = random.Random(seed).sample(all_, len(gate))
        assert controls.merged(bench.control(gate_plan, controls.Control("random", seed))) == set(names)


def test_the_exact_p_is_the_share_of_orders_in_which_the_gate_is_as_good():
    assert controls.exact_p(0.9, [0.1, 0.2, 0.3]) == 1 / 4
    assert controls.exact_p(0.0, [0.1, 0.2, 0.3]) == 1
    assert controls.exact_p(0.2, [0.1, 0.2, 0.3]) == 3 / 4
    # If the gate is one more draw, p ≤ k/n happens in a share k/n of all cases.
    values = [0.5, 0.1, 0.9, 0.3, 0.7]
    p = sorted(controls.exact_p(values[i], values[:i] + values[i + 1 :]) for i in range(5))
    assert p == [k / 5 for k in range(1, 6)]


# The bench


def scored(*benches):
    """Names of the models that really ran, in order."""
    return [one.text.split(":")[0] for bench in benches for one in bench.told if isinstance(one, Note)]


def test_equal_models_are_scored_once_and_kept(recipe, tmp_path):
    store = tmp_path / "scores.jsonl"
    bench = open_bench(recipe, store)
    tasks = ["safemerge_refusal_tuning"]
    first = bench.score(bench.graph(bench.plan(("gate.fraction=0.5",))), "half", tasks)
    # Three of six are half: another name for the same bytes. At none, alpha does not matter.
    assert bench.score(bench.graph(bench.plan(("gate.lowest=3",))), "three", tasks).tasks == first.tasks
    none = bench.score(bench.graph(bench.plan(("gate.never=true",))), "none", tasks)
    other = bench.plan(("gate.never=true", "merge.alpha=0.1"))
    assert bench.score(bench.graph(other), "none too", tasks).tasks == none.tasks
    assert bench.score(bench.role("finetuned"), "fine-tuned", tasks).tasks == none.tasks
    assert scored(bench) == ["half", "none"]
    # Another limit is another score.
    assert bench.score(bench.graph(other), "fewer", tasks, limit=2).metric(tasks[0], "refusal").n == 2
    assert scored(bench) == ["half", "none", "fewer"]
    # A torn last line costs that line only.
    store.write_text(store.read_text() + '{"key": "x", "sco')
    again = open_bench(recipe, store)
    assert again.score(again.graph(again.plan(("gate.fraction=0.5",))), "half", tasks).tasks == first.tasks
    assert scored(again) == []
    assert len(again.score(again.role("aligned"), "aligned", tasks).tasks) == 1
    last = open_bench(recipe, store)
    last.score(last.role("aligned"), "aligned", tasks)
    assert scored(again, last) == ["aligned"]


def test_a_point_scores_like_its_written_output(recipe, tmp_path):
    bench = open_bench(recipe, tmp_path / "scores.jsonl")
    point = ("gate.fraction=0.7", "merge.alpha=0.2")
    found = bench.score(bench.graph(bench.plan(point)), "point", ["safemerge_refusal", "safemerge_qa"])
    overrides = [part for override in point for part in ("--set", override)]
    run("run", recipe, "--output", tmp_path / "out", "--no-evaluate", "--device", "cpu", *overrides)
    written = evaluate(
        tmp_path / "out", ["safemerge_refusal", "safemerge_qa"], limit=4, device="cpu", keep_answers=True
    )
    assert found.tasks == written.tasks


def test_a_sweep_is_of_one_family(recipe, tmp_path):
    bench = open_bench(recipe, tmp_path / "scores.jsonl")
    with pytest.raises(RecipeError, match="changes the sources"):
        bench.plan(("sources.finetuned.adapter=./safety",))


@pytest.mark.slow
def test_sweep_end_to_end(recipe, tmp_path, capsys):
    arguments = ("sweep", recipe, "--grid", "gate.fraction=0.3,0.6", "--alpha", "0.2,0.7", "--seeds", 1, "--limit", 2)
    run(*arguments, "--output", tmp_path / "s", "--json", "--device", "cpu")
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "s" / "safemerge_sweep.json").read_text())
    points = ["merge.alpha=0.2, gate.fraction=0.3", "merge.alpha=0.2, gate.fraction=0.6",
              "merge.alpha=0.7, gate.fraction=0.3", "merge.alpha=0.7, gate.fraction=0.6"]  # fmt: skip
    assert list(content["tuning"]["models"]) == ["finetuned", "aligned", *points]
    assert content["merged"] == dict(zip(points, [2, 4, 2, 4], strict=True))
    assert all(task.endswith("_tuning") for task in content["tuning"]["tasks"])
    assert content["test"]["tasks"] == ["safemerge_refusal", "safemerge_arithmetic"]
    chosen = content["chosen"]["label"]
    expected = ["finetuned", "aligned", chosen, "random 0", "random per module 0"]
    assert list(content["test"]["models"]) == [*expected, "complement", "merge all", "merge none"]
    assert content["test"]["models"]["merge none"] == content["test"]["models"]["finetuned"]
    for test in content["control_tests"]:
        assert test["p"] == controls.exact_p(test["value"], test["draws"])
        assert (test["reached"], len(test["draws"])) == (sum(d >= test["value"] for d in test["draws"]), 1)
    # The recipe of the choice is sound elsewhere and says the chosen keys.
    written = load_recipe(tmp_path / "s" / "chosen.yaml").recipe
    assert f"merge.alpha={written.merge.alpha}, gate.fraction={written.gate.fraction}" == chosen
    assert ET.parse(tmp_path / "s" / "safemerge_sweep.svg").getroot().tag.endswith("svg")
    # The same command again scores nothing.
    run(*arguments, "--output", tmp_path / "s", "--device", "cpu")
    assert "scored (" not in capsys.readouterr().err


@pytest.mark.slow
def test_recipes_of_one_family_are_compared_with_their_controls(recipe, tmp_path, capsys):
    """Two recipes, one of which reads no base and takes a mask that is made here."""
    text = recipe.read_text()
    folder = recipe.parent
    (folder / "masked.yaml").write_text(
        text.replace("gate: {metric: rho, fraction: 0.5}", "gate: {always: true}").replace(
            "merge: {method: linear, alpha: 0.5}",
            "merge: {method: mask, mask: {path: drift.safetensors, top: 0.2, fill: aligned}}",
        )
    )
    run("score", recipe, "--by", "drift", "-o", folder / "drift.safetensors")
    capsys.readouterr()
    arguments = ("sweep", "--recipes", recipe, folder / "masked.yaml", "--seeds", 1, "--limit", 2)
    run(*arguments, "--output", tmp_path / "s", "--json", "--device", "cpu")
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "s" / "safemerge_recipes.json").read_text())
    assert list(content["values"]) == ["finetuned", "aligned", "recipe", "masked"]
    assert content["recipes"]["recipe"] == {"method": "linear", "merged": 3, "gated": 6}
    assert content["recipes"]["masked"] == {"method": "mask", "merged": 6, "gated": 6}
    assert {test["control"] for test in content["control_tests"]["recipe"]} == {"random per module", "random"}
    assert "recipe: merge none" in content["models"]
    assert ET.parse(tmp_path / "s" / "safemerge_recipes.svg").getroot().tag.endswith("svg")
    run(*arguments, "--output", tmp_path / "s", "--device", "cpu")
    told = capsys.readouterr()
    assert "scored (" not in told.err
    assert "masked" in told.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipes", "{recipe}"), "found one recipe; expected at least two"),
        (("--recipes", "{recipe}", "{recipe}"), "a second recipe that goes by recipe"),
        (("{recipe}", "{other}"), "found 2 recipes; expected one, or --recipes"),
        (("--recipes", "{recipe}", "{other}", "--tau", "0.1"), "expected no grid"),
        (("--recipes", "{recipe}", "{other}"), "sources.finetuned: is .*safety.*, in recipe it is .*task"),
    ],
)
def test_recipes_that_cannot_be_compared_are_named(recipe, tmp_path, capsys, arguments, message):
    other = recipe.parent / "elsewhere.yaml"
    other.write_text(recipe.read_text().replace("finetuned: {adapter: ./task}", "finetuned: {adapter: ./safety}"))
    given = [one.format(recipe=recipe, other=other) for one in arguments]
    run("sweep", *given, "--output", tmp_path / "s", code=2)
    assert re.search(message, " ".join(capsys.readouterr().err.replace("│", " ").split()))


def test_what_cannot_be_swept_is_said(recipe, tmp_path, capsys):
    run("sweep", recipe, "--output", tmp_path / "s", code=2)
    assert "nothing to vary" in capsys.readouterr().err
    run("sweep", recipe, "--tau", "0.1,7", "--output", tmp_path / "s", code=2)
    assert "7" in capsys.readouterr().err
    run("sweep", recipe, "--tau", "0.1", "--set", "evaluate.tasks=[safemerge_refusal]", "--limit", 1,
        "--output", tmp_path / "s", "--device", "cpu", code=6)  # fmt: skip
    assert "lacks a utility task" in capsys.readouterr().err


def test_a_recipe_from_standard_input_can_be_swept(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(recipe.read_bytes())))
    run("sweep", "-", "--tau", "0.1", "--set", "evaluate.tasks=[safemerge_refusal]", "--output", tmp_path, code=6)
    assert "lacks a utility task" in capsys.readouterr().err


# Probes


def test_groups_partition_the_gated_tensors(gate_plan):
    all_ = set(controls.choosable(gate_plan))
    for by, count in (("tensor", 6), ("type", 3), ("block", 2)):
        found = groups(gate_plan, by)
        assert len(found) == count
        members = [name for group in found.values() for name in group]
        assert len(members) == len(set(members))
        assert set(members) == all_


@pytest.mark.slow
def test_probe_end_to_end(recipe, tmp_path, capsys):
    run("probe", recipe, "--by", "type", "--limit", 3, "--output", tmp_path / "p", "--json", "--device", "cpu")
    content = json.loads(capsys.readouterr().out)
    plan = open_bench(recipe, tmp_path / "s.jsonl").plan()
    assert list(content["groups"]) == list(groups(plan, "type"))
    tensors = {tensor.name: tensor.moments for tensor in plan.gated}
    for name, row in content["groups"].items():
        members = [m for key, m in tensors.items() if module_type(key) == name]
        assert row["tensors"] == len(members) == 2
        # ρ of the concatenated updates, from the definition.
        overlap, image, delta = (sum(getattr(m, key) for m in members) for key in ("overlap", "image", "delta"))
        assert row["rho"] == pytest.approx(overlap / (image * delta) ** 0.5)
        assert row["v_norm"] == pytest.approx(sum(m.v for m in members) ** 0.5)
    root = ET.parse(tmp_path / "p" / "safemerge_probe.svg").getroot()
    shown = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"ρ", "safety", "utility"} <= shown
    # A loaded recipe is probed as its file is, and nothing is scored twice.
    told = []
    again = api.probe(load(recipe), "type", tmp_path / "p", limit=3, device="cpu", on_event=told.append)
    assert again == content
    assert not [one for one in told if isinstance(one, Note) and "scored" in one.text]
    run("probe", recipe, "--by", "layer", "--output", tmp_path / "p", code=2)


def test_v_can_be_added_at_equal_norm(recipe, tmp_path, capsys):
    place = ("--limit", 2, "--output", tmp_path / "p", "--json", "--device", "cpu")
    vector = ("--set", "merge={method: add_safety_vector, gamma: 0.5}")
    run("probe", recipe, "--equal-norm", *vector, *place)
    content = json.loads(capsys.readouterr().out)
    assert content["equal_norm"]
    sizes = [row["gamma"] * row["v_norm"] for row in content["groups"].values()]
    norms = sorted(row["v_norm"] for row in content["groups"].values())
    assert len({round(norm, 6) for norm in norms}) == len(norms) == 3, "they differ of themselves"
    assert sizes == pytest.approx([0.5 * norms[1]] * 3)
    run("probe", recipe, "--equal-norm", *place, code=4)
    assert "expected add_safety_vector" in capsys.readouterr().err


def test_the_change_that_is_added_at_equal_norm_has_it(recipe, tmp_path):
    import torch

    bench = open_bench(recipe, tmp_path / "s.jsonl", "merge={method: add_safety_vector, gamma: 1.0}")
    plan = bench.plan()
    found = groups(plan, "type")
    gammas = equal_gammas(plan, found)
    live, sizes = bench.live(), []
    for name, members in found.items():
        live.become(bench.role("finetuned"))
        before = {key: value.float().clone() for key, value in live.model.state_dict().items()}
        own = bench.plan((f"merge.gamma={gammas[name]!r}",))
        live.become(bench.graph(controls.with_merged(own, members, "probe")))
        moved = {key: value.float() - before[key] for key, value in live.model.state_dict().items()}
        assert {key for key, change in moved.items() if change.any()} == set(members)
        sizes.append(float(torch.stack([change.norm() for change in moved.values()]).norm()))
    assert max(sizes) == pytest.approx(min(sizes), rel=0.01)  # bfloat16


def test_correlations_of_constant_columns_are_none():
    measures = ("rho", "rho_ratio", "v_norm")
    rows = {str(i): {**dict.fromkeys(measures, i / 10), "safety": i * 0.01, "utility": 0.0} for i in range(5)}
    found = {(c["metric"], c["change"]): c for c in correlations(rows)}
    assert found["rho", "safety"]["spearman"] == pytest.approx(1)
    assert found["rho", "utility"]["spearman"] is None


def test_spearman_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    import random

    draw = random.Random(1)
    for n in (8, 30):
        first = [draw.gauss(0, 1) for _ in range(n)]
        second = [round(a + draw.gauss(0, 2)) for a in first]  # ties
        value, p = spearman(first, second)
        expected = stats.spearmanr(first, second)
        assert value == pytest.approx(expected.statistic)
        assert p == pytest.approx(expected.pvalue, abs=0.03)
    # Every order of three is as likely: a perfect one or its reverse has p = 1/3.
    assert spearman([1, 2, 3], [4, 5, 6])[1] == pytest.approx(1 / 3, abs=0.02)
    with pytest.raises(ValueError, match="constant"):
        spearman([1, 1, 1], [1, 2, 3])


# Pictures


def test_the_front_is_what_nothing_beats():
    marks = [Mark(f"m{i}", "point", u / 10, s / 10) for i, (u, s) in
             enumerate([(1, 9), (5, 5), (5, 6), (9, 1), (4, 4), (9, 1)])]  # fmt: skip
    beaten = {
        m.label for m in marks
        if any(o.utility >= m.utility and o.safety >= m.safety and (o.utility, o.safety) != (m.utility, m.safety)
               for o in marks)
    }  # fmt: skip
    assert {m.label for m in front(marks)} == {m.label for m in marks} - beaten - {"m5"}


def test_a_hostile_label_stays_text():
    picture = scatter([Mark("</svg><script>x</script>", "chosen", 0.5, 0.5)], "utility", "safety")
    assert "<script" not in picture
    ET.fromstring(picture)
    assert not re.search(r"https?://(?!www\.w3\.org)", picture)
