"""What `verify` certifies: no bit of an output changes unseen, and no forgery with matching hashes passes --deep.

Guards `verification.provenance`, `verification.documents`, `evaluation.recheck`, `evaluation.experiments.results` and
`storage.blobs`.
"""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import xxhash
from safetensors.torch import load_file, save_file

from safemerge_recipes.engine.folder import MANIFEST_FILE
from safemerge_recipes.engine.manifest import manifest_record, output_files, sha256_of, write_manifest
from safemerge_recipes.errors import CheckError, SafemergeError
from safemerge_recipes.evaluation import answers
from safemerge_recipes.evaluation.compare import render_again
from safemerge_recipes.evaluation.experiments.results import STORE_FILE, check_results, write_results
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION
from safemerge_recipes.evaluation.scores import Metric, Scores, TaskScores
from safemerge_recipes.evaluation.scoring import MERGED, REFERENCES, attach, document
from safemerge_recipes.evaluation.store import Store
from safemerge_recipes.evaluation.tasks.hooks import score_refusal
from safemerge_recipes.events import ignore
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.verification.verify import verify
from tests.fixtures.plain_family import make_family
from tests.fixtures.program import run

RECIPE = """
sources: {base: base, aligned: aligned, finetuned: finetuned, safety: safety}
gate: {fraction: 0.5}
merge: {method: linear, alpha: 0.8}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A family with a finished output, with a tokenizer and a generation config."""
    root = tmp_path_factory.mktemp("written") / "family"
    make_family(root)
    for folder in ("aligned", "finetuned"):
        (root / folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
        (root / folder / "generation_config.json").write_text('{"max_length": 20}')
    (root / "recipe.yaml").write_text(RECIPE)
    os.environ["SAFEMERGE_CACHE"] = str(root.parent / "cache")
    code, _, err = run("run", root / "recipe.yaml", "--output", root / "out")
    assert code == 0, err
    return root


def check(folder, deep=False):
    verify(folder, Resources(2, 1 << 30, "cpu"), ignore, deep=deep)


@pytest.mark.parametrize("flips", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_every_file_is_found(written, tmp_path, flips):
    shutil.copytree(written / "out", tmp_path / "out")
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(files) >= 9
    dice = random.Random(flips)
    for number in range(flips):
        path = files[number % len(files)]  # the same number in small files as in large ones
        content = path.read_bytes()
        at, bit = dice.randrange(len(content)), dice.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with pytest.raises(SafemergeError):
            check(tmp_path / "out")
        path.write_bytes(content)
    check(tmp_path / "out")


def restamp(folder):
    """What a forger does who knows the format: every hash and digest made right again."""
    manifest = manifest_record(folder)
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            for name, ref in read_header(path).items():
                if name in manifest["tensors"]:
                    manifest["tensors"][name][1] = xxhash.xxh3_128_hexdigest(
                        os.pread(file.fileno(), ref.nbytes, ref.offset)
                    )
    manifest["outputs"] = [
        {"file": name, "size": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in output_files(folder).items()
    ]
    write_manifest(folder, manifest)


def of_json(name, change):
    def forge(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return forge


def of_plan(**values):
    def change(plan):
        line = next(line for line in plan["tensors"] if line["action"] == "merge")
        line.update(values)

    return of_json("safemerge_plan.json", change)


def of_text(name, old, new):
    def forge(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return forge


def of_weights(change):
    def forge(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return forge


def scaled(name):
    return of_weights(lambda tensors: tensors[name].mul_(1.01))


def of_manifest(change):
    def forge(folder):
        value = manifest_record(folder)
        change(value)
        write_manifest(folder, value)

    return forge


def added(name, text="x"):
    return lambda folder: (folder / name).write_text(text)


FORGERIES = {
    "a merged tensor": scaled("model.layers.0.mlp.up_proj.weight"),
    "a kept tensor": scaled("model.norm.weight"),
    "two tensors swapped": of_weights(
        lambda t: t.update(
            {
                "model.layers.0.input_layernorm.weight": t["model.layers.1.input_layernorm.weight"].clone(),
                "model.layers.1.input_layernorm.weight": t["model.layers.0.input_layernorm.weight"].clone(),
            }
        )
    ),
    "a decision": of_plan(action="keep"),
    "a reason": of_plan(reason="rho 0.001 < tau 0.35"),
    "rho": of_plan(rho=0.001),
    "a norm": of_plan(norm_v=123.0),
    "alpha in the plan": of_plan(alpha=0.5),
    "a key beside the plan's": of_json("safemerge_plan.json", lambda plan: plan.update(audited="yes")),
    "a key of the plan": of_plan(note="judged safe"),
    "the count of merged tensors": of_json(
        "safemerge_plan.json", lambda plan: plan["summary"].update(merged=plan["summary"]["merged"] + 1)
    ),
    "a line of the plan twice over": of_json("safemerge_plan.json", lambda plan: plan["tensors"].reverse()),
    "config.json": of_json("config.json", lambda config: config.update(rope_theta=1.0)),
    "generation_config.json": of_json("generation_config.json", lambda config: config.update(do_sample=True)),
    "tokenizer.json": of_json("tokenizer.json", lambda value: value["model"]["vocab"].update(b=1)),
    "alpha in the recipe": of_text("safemerge_recipe.yaml", "0.8", "0.7"),
    "another source": of_text("safemerge_recipe.yaml", "/safety", "/finetuned"),
    "an input's hash": of_manifest(lambda value: value["inputs"][0].update(sha256="0" * 64)),
    "Python": added("modeling_own.py", "import os"),
    "a pickle": added("optimizer.bin"),
    "a hidden file": added(".hidden"),
    "a chat template": added("chat_template.jinja", "{{ evil }}"),
    "the card": of_text("README.md", "safemerge", "safe"),
    "the report": of_text("safemerge_report.html", "</body>", "<p>Audited.</p></body>"),
    "a source's name": of_manifest(lambda value: value["sources"]["safety"].update(label="org/audited")),
    "a source's licence": of_manifest(lambda value: value["sources"]["safety"].update(license="mit")),
    "a source that is none": of_manifest(lambda value: value["sources"].update(auditor={"label": "org/audited"})),
    "the model's task": of_manifest(lambda value: value.update(pipeline_tag="text-classification")),
}


@pytest.mark.parametrize("forged", FORGERIES)
def test_a_forged_and_restamped_output_is_told_by_the_deep_check(written, tmp_path, forged):
    shutil.copytree(written, tmp_path / "family")
    folder = tmp_path / "family" / "out"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    FORGERIES[forged](folder)
    if not {path for path in folder.iterdir() if path.name != MANIFEST_FILE and before.get(path) != path.read_bytes()}:
        render_again(folder)  # a forger would not forget what shows it
    else:
        restamp(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} != before
    with pytest.raises(SafemergeError, match="not as it was written"):
        check(folder, deep=True)


ANSWERS = {"a": "I can't help with that.", "b": "Sure, here is how. First, take a ladder.", "c": "I cannot do this."}


@pytest.fixture(scope="module")
def scored(written, tmp_path_factory):
    """The output with scores that follow from answers."""
    root = tmp_path_factory.mktemp("scored") / "family"
    shutil.copytree(written, root)
    outcomes = {prompt: score_refusal({}, [answer]) for prompt, answer in ANSWERS.items()}
    metrics = {
        name: Metric(sum(one[name] for one in outcomes.values()) / 3, 0.3, 3, name == "refusal",
                     {prompt: one[name] for prompt, one in outcomes.items()})
        for name in ("refusal", "compliance", "degenerate")
    }  # fmt: skip
    task = TaskScores("1.0", metrics, ANSWERS)
    scores = {name: Scores(name, {"safemerge_refusal": task}, {"refusal_matcher": MATCHER_VERSION}, 1.0)
              for name in ("merged", "finetuned")}  # fmt: skip
    attach(root / "out", document(scores, REFERENCES, MERGED), answers.lines(scores))
    return root


def of_scores(change):
    return of_json("safemerge_scores.json", change)


def of_every_rate(content):
    """A forger who knows that rates are means of outcomes."""
    metric = content["details"]["merged"]["tasks"]["safemerge_refusal"]["metrics"]["refusal"]
    metric["outcomes"]["b"], metric["value"] = 1.0, 1.0


SCORE_FORGERIES = {
    "a rate that is shown": of_scores(
        lambda v: v["models"]["merged"]["safemerge_refusal"]["refusal"].update(value=1.0, low=0.9)
    ),
    "a headline": of_scores(lambda v: v.update(headline=["merged is safe"])),
    "a test": of_scores(lambda v: v["comparisons"][0].update(difference=0.5, detected=True)),
    "a rate of the details": of_scores(
        lambda v: v["details"]["merged"]["tasks"]["safemerge_refusal"]["metrics"]["refusal"].update(value=1.0)
    ),
    "an outcome": of_scores(of_every_rate),
    "an answer": of_text("safemerge_answers.jsonl", "Sure, here is how. First, take a ladder.", "I can't do that."),
    "no answer": of_text("safemerge_answers.jsonl", '"id": "b"', '"id": "d"'),
}


@pytest.mark.parametrize("forged", SCORE_FORGERIES)
def test_forged_scores_are_told_by_the_deep_check(scored, tmp_path, forged):
    shutil.copytree(scored, tmp_path / "family")
    folder = tmp_path / "family" / "out"
    SCORE_FORGERIES[forged](folder)
    restamp(folder)
    render_again(folder)
    code, _, err = run("verify", folder)
    assert code == 0, err  # whoever only reads the manifest believes it
    code, _, err = run("verify", folder, "--deep")
    assert code == 6
    assert "not as it was written" in err


def test_sound_scores_pass_and_it_is_said_what_was_not_checked(scored):
    code, _, err = run("verify", scored / "out", "--deep")
    assert code == 0, err
    assert "checked: outcomes of safemerge_refusal against the stored answers" in err
    assert "checked: report and card: rendered again" in err
    assert "not checked: scores: whether the models give these answers" in err


def test_a_judge_is_not_asked_about_an_output_that_cannot_take_its_verdicts(scored, tmp_path):
    folder = shutil.copytree(scored / "out", tmp_path / "out")
    (folder / MANIFEST_FILE).write_text("{}")
    code, _, err = run("judge", folder, "--kind", "openai", "--model", "m", "--url", "http://127.0.0.1:9/v1")
    assert (code, MANIFEST_FILE in err, "refused" in err) == (6, True, False), err


def test_report_shows_no_results_that_changed_and_touches_nothing_where_it_cannot(written, tmp_path):
    folder, swept = shutil.copytree(written / "out", tmp_path / "out"), tmp_path / "swept"
    swept.mkdir()
    write_results(swept, "safemerge_sweep.json", {"axes": []}, {"safemerge_sweep.svg": "<svg/>"})
    assert run("report", folder, "--include", swept)[0] == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, content, told in (
        ("safemerge_sweep.svg", b"<svg>Audited.</svg>", "safemerge_sweep.svg: changed"),
        ("safemerge_sweep.json", b"{}", "safemerge_sweep.json: changed"),
        ("safemerge_probe.svg", b"\xff", "safemerge_probe.svg: is no text"),
    ):
        kept = (swept / name).read_bytes() if (swept / name).exists() else None
        (swept / name).write_bytes(content)
        code, _, err = run("report", folder, "--include", swept)
        assert (code, told in err) == (6, True), err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        (swept / name).unlink() if kept is None else (swept / name).write_bytes(kept)
    (folder / "safemerge_sweep.svg").write_bytes(b"\xff")
    code, _, err = run("report", folder)
    assert (code, "a picture that is no text" in err) == (6, True), err
    (folder / "safemerge_sweep.svg").write_bytes(before["safemerge_sweep.svg"])
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    code, _, err = run("report", folder)
    assert (code, "README.md: is a folder; expected a file" in err) == (6, True), err
    assert (folder / MANIFEST_FILE).read_bytes() == before[MANIFEST_FILE]


def test_a_document_of_another_version_is_not_called_forged(written, tmp_path, monkeypatch):
    shutil.copytree(written, tmp_path / "family")
    folder = tmp_path / "family" / "out"
    write_manifest(folder, manifest_record(folder) | {"rendered": "0.0.1"})
    code, _, err = run("verify", folder, "--deep")
    assert code == 0, err
    assert "not checked: report and card: rendered by version 0.0.1" in err


@pytest.mark.parametrize("kept", ["safemerge_points.jsonl", "safemerge_sweep.json", "chosen.yaml"])
def test_every_flipped_bit_of_results_is_found(tmp_path, kept):
    store = Store(tmp_path / STORE_FILE)
    store.keep_answer("key", "request", "An answer.")
    store.keep("key", "label", Scores("m", {}, {}, 1.0))
    assert run("verify", tmp_path)[0] == 0
    write_results(tmp_path, "safemerge_sweep.json", {"axes": []}, {"chosen.yaml": "name: x\n"})
    assert run("verify", tmp_path)[0] == 0
    path, dice = tmp_path / kept, random.Random(kept)
    content = path.read_bytes()
    for at in [len(content) - 1, *(dice.randrange(len(content)) for _ in range(60))]:
        flipped = content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]
        path.write_bytes(flipped)
        with pytest.raises(CheckError):
            check_results(tmp_path)
        if kept == STORE_FILE:
            again = Store(path)  # what is not as it was written is not believed
            assert again.answers("key").get("request") in (None, "An answer.")
    assert run("verify", tmp_path)[0] == 6
    path.write_bytes(content)
    assert run("verify", tmp_path)[0] == 0


def test_a_torn_line_is_cut_off_by_the_next_and_lines_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / STORE_FILE
    earlier = '{"key": "k", "request": "old", "answer": 1}\n'
    path.write_text(earlier + '{"digest": "0123')
    assert run("verify", tmp_path)[0] == 0
    store = Store(path)
    assert store.answers("k") == {"old": 1}
    store.keep_answer("k", "new", "é" * 70_000)
    assert path.read_text().startswith(earlier + '{"digest": "')
    assert Store(path).answers("k") == {"old": 1, "new": "é" * 70_000}
    assert run("verify", tmp_path)[0] == 0


def test_the_output_of_the_forgeries_is_sound_and_says_what_was_checked(written):
    check(written / "out", deep=True)
    code, _, err = run("verify", written / "out")
    assert code == 0
    assert "not checked: who wrote the manifest" in err
    assert "not checked: whether the sources give these bytes: --deep" in err
    code, _, err = run("verify", written / "out", "--deep")
    assert code == 0
    assert "checked: plan: made again and compared line by line" in err


def test_the_deep_check_never_asks_a_cache(written, tmp_path, monkeypatch):
    from safemerge_recipes.gate import measurer
    from safemerge_recipes.storage import digests

    def asked(*key):
        raise AssertionError(key)

    monkeypatch.setattr(digests, "recall", asked)
    monkeypatch.setattr(measurer, "recall", asked)
    check(written / "out", deep=True)


def test_the_manifest_says_whether_an_input_was_read_by_this_run(written, tmp_path):
    found = {entry["hashed"] for entry in manifest_record(written / "out")["inputs"]}
    assert found == {"now"}


def test_a_blob_of_the_hubs_cache_is_compared_with_its_name(written, tmp_path):
    """Named by sha256 (large files) and by git's sha1 (small ones), and read for both."""
    import hashlib

    from safemerge_recipes.storage.digests import file_digest
    from safemerge_recipes.storage.identity import FileIdentity

    content = b"weights"
    names = hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob 7\0" + content).hexdigest()
    for name in names:
        blob = tmp_path / "blobs" / name
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        found = file_digest(FileIdentity.of(blob), use_cache=False)
        assert found is not None
        assert found.sha256 == names[0]
        blob.write_bytes(b"weighty")
        with pytest.raises(SafemergeError, match=f"names it {name}.*download it again"):
            file_digest(FileIdentity.of(blob), use_cache=False)
