"""Scores of finished outputs, recipes and models, as commands give them and keep them.

Guards `cli.scores`, `evaluation.answers`, `evaluation.compare`, `evaluation.scores`, `report.scores`.
"""

import base64
import hashlib
import json
import math
import re
import shutil

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
from safemerge_recipes.cli import app as cli
from safemerge_recipes.evaluation.harness import Metric, Scores, Subject, TaskScores, evaluate, result_keys
from safemerge_recipes.evaluation.rates import holm, mcnemar
from safemerge_recipes.evaluation.scoring import compared, interval
from safemerge_recipes.evaluation.suite import load_suite
from tests.fixtures.chat_family import make_family


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def output(family, tmp_path_factory):
    """The recipe's output, with scores."""
    folder = tmp_path_factory.mktemp("result") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        run("run", family, "--output", folder, "--device", "cpu")
    return folder


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    assert end.value.code == code


def test_every_model_scores_as_its_own_folder_does(family, output, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path))
    content = json.loads((output / "safemerge_scores.json").read_text())
    assert list(content["models"]) == ["merged", "aligned", "finetuned"]
    tasks = ["safemerge_refusal", "safemerge_arithmetic"]
    merged = evaluate(output, tasks, limit=4, device="cpu")
    assert Scores.from_json(json.dumps(content["details"]["merged"])).tasks == merged.tasks
    # The roles exist only as adapters: written out as models of their own they answer the same.
    keep_aligned = family.with_name("aligned.yaml")
    keep_aligned.write_text(family.read_text() + 'rules: [{tensors: "*", keep: aligned}]')
    for role, recipe in (("aligned", keep_aligned), ("finetuned", family)):
        folder = tmp_path / role
        run("run", recipe, "--output", folder, "--set", "gate.never=true", "--no-evaluate", "--device", "cpu")
        expected = evaluate(folder, tasks, limit=4, device="cpu").tasks
        assert set(content["models"][role]) == set(expected)
        for task, found in content["models"][role].items():
            for metric, entry in found.items():
                assert entry["value"] == expected[task].metrics[metric].value
                assert entry["low"] <= entry["value"] <= entry["high"]
                assert entry["n"] == 4


def test_a_backend_that_loads_folders_scores_the_same_models(family, output, tmp_path, monkeypatch):
    """By another of lm-eval's names for transformers, so that registry, written sources and scores are real."""
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expected = json.loads((output / "safemerge_scores.json").read_text())
    run("run", family, "--output", tmp_path / "out", "--set", "evaluate.backend=huggingface", "--device", "cpu")
    found = json.loads((tmp_path / "out" / "safemerge_scores.json").read_text())
    for model, tasks in expected["models"].items():
        own = {task: one for task, one in tasks.items() if task != "safemerge_separation"}
        for task, metrics in own.items():
            assert found["models"][model][task] == metrics, (model, task)
        assert found["details"][model]["settings"]["backend"] == "huggingface"
        assert not found["details"][model]["tasks"]["safemerge_refusal"]["likelihoods"], "no AUROC without hf"
    assert not list(tmp_path.glob("safemerge-*")), "what was written for it is gone"


def test_a_named_dtype_is_what_any_machine_computes_in(family, tmp_path, monkeypatch):
    """`auto` is bfloat16 on one processor and float32 on another; one store serves both names and mixes nothing up."""
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ("--set", "evaluate.limit=2", "--set", "evaluate.tasks=[safemerge_arithmetic]", "--device", "cpu")
    for dtype in ("float32", "bfloat16"):
        run("run", family, "--output", tmp_path / dtype, "--set", f"evaluate.dtype={dtype}", *small)
        found = json.loads((tmp_path / dtype / "safemerge_scores.json").read_text())["details"]
        assert {one["settings"]["dtype"] for one in found.values()} == {dtype}


def test_a_kept_score_is_found_again_only_where_auto_means_the_same(monkeypatch):
    suite, subject, keys = load_suite(("safemerge_arithmetic",)), Subject("x", "key", lambda: None), {}
    for able in (True, False):
        monkeypatch.setattr("safemerge_recipes.evaluation.models._cpu_has_bfloat16", lambda able=able: able)
        keys[able] = [result_keys(subject, suite, device="cpu", dtype=dtype) for dtype in ("auto", "float32")]
    assert keys[True][0] != keys[False][0]
    assert keys[True][1] == keys[False][1]


def test_scores_are_in_the_documents_and_the_manifest_fits_the_folder(output):
    content = json.loads((output / "safemerge_scores.json").read_text())
    assert "finetuned" in (output / "README.md").read_text()
    assert "safemerge_arithmetic" in (output / "safemerge_report.html").read_text()
    manifest = json.loads((output / "safemerge_manifest.json").read_text())
    names = [entry["file"] for entry in manifest["outputs"]]
    on_disk = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert names == sorted(on_disk - {"safemerge_manifest.json"})
    for entry in manifest["outputs"]:
        data = (output / entry["file"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    run("verify", output)
    assert {(c["model"], c["reference"]) for c in content["comparisons"]} == {
        ("merged", "finetuned"),
        ("merged", "aligned"),
    }
    # Refusal and what is degenerate are tested; compliance follows from them.
    assert {c["metric"] for c in content["comparisons"]} == {"refusal", "degenerate", "acc"}


def scores(name, outcomes):
    """Refusal outcomes by prompt; nothing degenerate."""

    def metric(values, better):
        share = sum(values.values()) / len(values)
        return Metric(share, math.sqrt(share * (1 - share) / (len(values) - 1)), len(values), better, values)

    refusal = {str(i): float(x) for i, x in enumerate(outcomes)}
    comply = {key: 1 - x for key, x in refusal.items()}
    task = TaskScores("1.0", {"refusal": metric(refusal, True), "compliance": metric(comply, False)})
    return Scores(name, {"t": task}, {}, 0.0)


def test_one_correction_over_all_references():
    models = {
        "merged": scores("merged", [1] * 12 + [0] * 8),
        "finetuned": scores("finetuned", [0] * 15 + [1] * 5),
        "aligned": scores("aligned", [1] * 20),
    }
    found = compared(models, ("finetuned", "aligned", "absent"), "merged")
    assert [(d.model, d.reference, d.metric) for d in found] == [
        ("merged", "finetuned", "refusal"),
        ("merged", "aligned", "refusal"),
    ]
    # Twelve prompts only merged refuses, five only the fine-tuned model; none and eight.
    raw = [mcnemar(5, 12), mcnemar(8, 0)]
    assert [d.p for d in found] == raw
    assert [d.p_holm for d in found] == holm(raw)
    pairs = {(d.model, d.reference) for d in compared(models, ("finetuned", "aligned"))}
    assert pairs == {("merged", "finetuned"), ("aligned", "finetuned"), ("merged", "aligned")}


def test_intervals():
    low, high = interval(scores("x", [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]).tasks["t"].metrics["refusal"])
    # Wilson's interval solves (p − x/n)² = z² p(1 − p) / n.
    for bound in (low, high):
        assert (bound - 0.2) ** 2 == pytest.approx(1.959963985**2 * bound * (1 - bound) / 10)
    assert low < 0.2 < high
    mean = Metric(0.4, 0.1, 3, True, {"a": 0.1, "b": 0.4, "c": 0.7})
    assert interval(mean) == pytest.approx((0.4 - 0.196, 0.4 + 0.196))
    assert interval(Metric(None, None, 0)) == (None, None)
    assert interval(Metric(12.5, None, 3)) == (None, None)


def test_report_and_evaluate_work_on_the_finished_folder(output, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    (copy / "README.md").unlink()
    run("report", copy)
    assert (copy / "README.md").read_text() == (output / "README.md").read_text()
    run("verify", copy)
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "safemerge_sweep.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    run("report", copy, "--include", tmp_path / "swept")
    page = (copy / "safemerge_report.html").read_text()
    shown = re.findall(r'<img alt="Sweep" src="data:image/svg\+xml;base64,([^"]*)">', page)
    assert [base64.b64decode(one) for one in shown] == [(copy / "safemerge_sweep.svg").read_bytes()]
    assert "img-src data:" in page
    run("verify", copy)
    run("report", copy, "--include", tmp_path, code=6)
    capsys.readouterr()
    run("evaluate", copy, "--tasks", "safemerge_qa", "--limit", 2, "--json", "--device", "cpu")
    content = json.loads(capsys.readouterr().out)
    assert content["models"]["merged"]["safemerge_qa"]["acc"]["n"] == 2
    assert content == json.loads((copy / "safemerge_scores.json").read_text())
    run("report", tmp_path, code=6)
    assert "safemerge_manifest.json" in capsys.readouterr().err


def test_an_output_of_another_recipe_is_not_scored_as_this_one(family, output, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path))
    run("evaluate", family, "--output", output, "--set", "merge.alpha=0.4", "--device", "cpu", code=6)
    assert "3 tensors are not what the recipe gives now" in capsys.readouterr().err


def test_compare_takes_folders_recipes_and_scores(family, output, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path))
    base = family.parent / "base"
    models = (
        family,
        f"kept={output / 'safemerge_scores.json'}",
        f"written={output}",
        f"{base}+{family.parent / 'alignment'}",
    )
    tasks = ("--tasks", "safemerge_refusal,safemerge_arithmetic", "--limit", 4)
    run("compare", *models, *tasks, "--reference", "finetuned", "--json", "--device", "cpu")
    found = json.loads(capsys.readouterr().out)["models"]
    assert list(found) == [
        "base", "aligned", "finetuned", "safety", "merged", "kept merged", "kept aligned", "kept finetuned", "written",
        "alignment",
    ]  # fmt: skip
    assert found["merged"] == found["kept merged"] == found["written"]
    assert found["aligned"] == found["kept aligned"]
    run("compare", base, base, *tasks, code=2)
    assert "a second model named 'base'" in capsys.readouterr().err
