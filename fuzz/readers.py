# ruff: noqa: E501  # pieces of formats are easier to read on one line
"""Targets for what is read beside models: composed recipes, locks, training files, rows, records, scores, replies.

Like those of `targets`: each returns normally or raises what a user is meant to see.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping

from fuzz.places import lay, place, stored, tensor
from safemerge_recipes.errors import CheckError, RecipeError, SafemergeError, SourceError
from safemerge_recipes.evaluation.answers import read_answers
from safemerge_recipes.evaluation.compare import read_scores
from safemerge_recipes.evaluation.experiments.results import check_results
from safemerge_recipes.evaluation.judge import Server
from safemerge_recipes.evaluation.scores import Scores
from safemerge_recipes.evaluation.scoring import document
from safemerge_recipes.evaluation.store import Store
from safemerge_recipes.evaluation.verdicts import read_guard, read_rubric, read_word, read_yes
from safemerge_recipes.pipeline.lock import find_lock, pinned
from safemerge_recipes.recipe.loading import load_recipe, parse_recipe, read_names
from safemerge_recipes.recipe.training import load_training
from safemerge_recipes.recipe.writing import dump_recipe
from safemerge_recipes.report.card import render_card
from safemerge_recipes.report.page import render_report
from safemerge_recipes.sources.locate import Folder
from safemerge_recipes.sources.peft.adapter import open_adapter
from safemerge_recipes.sources.provenance import describe
from safemerge_recipes.sources.quantised.find import quantised as quantised_in
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.training.plan import read_prompts
from safemerge_recipes.training.rows import read_rows

PARENT = b"sources: {aligned: a, finetuned: f, base: b, safety: s}\ngate: {tau: ${tau}}\nmerge: {method: linear, alpha: 0.8}\nparameters: {tau: 0.3}\n"
_RECIPE = b"sources: {aligned: org/a, finetuned: org/f, base: org/b, safety: org/s}\ngate: {tau: 0.3}\nmerge: {method: linear, alpha: 0.8}\n"


def composed(data: bytes) -> None:
    """A recipe that may extend another one and use its parameters; what is accepted is written and read back."""
    lay("parent.yaml", PARENT)
    path = lay("child.yaml", data)
    try:
        recipe = load_recipe(path).recipe
    except (RecipeError, SourceError):
        return
    assert parse_recipe(dump_recipe(recipe), path).recipe == recipe


def overridden(data: bytes) -> None:
    """A `--set` text on a sound recipe."""
    try:
        parse_recipe(_RECIPE.decode(), "recipe.yaml", [data.decode("utf-8", "replace")])
    except (RecipeError, SourceError):
        return


def lock(data: bytes) -> None:
    """The lock of a recipe, read and applied to it."""
    path = lay("locked.yaml", _RECIPE)
    lay("locked.lock.yaml", data)
    loaded = load_recipe(path)
    try:
        found = find_lock(loaded)
        assert found is not None
        pinned(loaded, found)
    except (RecipeError, SourceError):
        return


def training(data: bytes) -> None:
    """A training file."""
    try:
        load_training(lay("train.yaml", data))
    except (RecipeError, SourceError):
        return


def rows(data: bytes) -> None:
    """Rows of training data, then the same bytes as prompts to keep out."""
    for name in ("rows.jsonl", "rows.json"):
        path = lay(name, data)
        for read in (lambda path=path: read_rows([path]), lambda path=path: read_prompts(path)):
            try:
                read()
            except (RecipeError, SourceError):
                continue


def names(data: bytes) -> None:
    """A file of names."""
    try:
        assert all(read_names(lay("names.txt", data)))
    except (RecipeError, SourceError):
        return


_MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
_LORA_CONFIG = b'{"peft_type":"LORA","r":2,"lora_alpha":4}'


def adapter_keys(data: bytes) -> None:
    """The header of an adapter's weights, beside a sound config."""
    lay("keys/adapter_config.json", _LORA_CONFIG)
    lay("keys/adapter_model.safetensors", stored(data, bytes(56)))
    try:
        open_adapter(place() / "keys")
    except (SourceError, RecipeError):
        return


def quantised(data: bytes) -> None:
    """The header of weights whose names may be those of quantised ones."""
    try:
        found = read_header(lay("quantised.safetensors", stored(data, bytes(56))))
    except SourceError:
        return
    assert quantised_in(found).keys() <= found.keys()


def record(data: bytes) -> None:
    """What an adapter's folder tells of itself: train.json, and the front matter of its card."""
    folder = lay("told/train.json", data).parent
    lay("told/README.md", data)
    lay("told/adapter_config.json", _LORA_CONFIG)
    try:
        describe(Folder("told", folder, "adapter", None), folder)
    except SourceError:
        return


def scores(data: bytes) -> None:
    """A scores file: what `compare` reads of it, and what report and card show."""
    path = lay("safemerge_scores.json", data)
    try:
        found = read_scores(path)
    except CheckError:
        found = {}
    with contextlib.suppress(CheckError):
        document(found, ("aligned",))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        plan = json.loads(_PLAN)
        render_report(plan, scores=value, provenance=None)
        render_card(plan, scores=value, provenance={"recipe": ""})


_PLAN = '{"summary": {"tensors": 1}, "tensors": [{"name": "a", "action": "keep", "gated": false, "reason": "r", "shape": [2], "dtype": "F32"}]}'


def told_plan(data: bytes) -> None:
    """A plan, as report and card show it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        try:
            render_report(value, scores=None, provenance=value)
            render_card(value, scores=None, provenance=value)
        except SafemergeError:
            return


def answers(data: bytes) -> None:
    """A file of answers."""
    try:
        read_answers(lay("answers.jsonl", data))
    except CheckError:
        return


def points(data: bytes) -> None:
    """A store of scores and answers, and the record of a sweep beside it."""
    path = lay("results/safemerge_points.jsonl", data)
    store = Store(path)
    store.answers("k")
    store.keep_answer("k", "r", "An answer.")
    assert Store(path).answers("k")["r"] == "An answer."
    lay("results/safemerge_sweep.json", data)
    try:
        check_results(path.parent)
    except CheckError:
        return


def reply(data: bytes) -> None:
    """A judge's reply: as a completion of a server, then as text."""
    from safemerge_recipes.evaluation.judge import _content

    try:
        text = _content(Server("http://localhost:1/v1", "m").url, data)
    except CheckError:
        text = data.decode("utf-8", "replace")
    for read in (read_word, read_yes, read_guard, read_rubric):
        assert read(text).label in ("safe", "unsafe", "unparseable")


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        composed,
        overridden,
        lock,
        training,
        rows,
        names,
        adapter_keys,
        quantised,
        record,
        scores,
        told_plan,
        answers,
        points,
        reply,
    )
}

_SCORES = json.dumps(
    {
        "details": {"merged": json.loads(Scores("m", {}, {}, 1.0).to_json())},
        "models": {"merged": {"safemerge_refusal": {"refusal": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 2}}}},
        "headline": ["a"],
        "comparisons": [],
        "cautions": [],
    }
).encode()
_KEYS = {f"{_MODULE}.lora_A.weight": tensor(0, 2, 3), f"{_MODULE}.lora_B.weight": tensor(24, 4, 2)}

DICTIONARY: Mapping[str, tuple[bytes, ...]] = {
    "composed": (
        b"extends: parent.yaml\n", b"extends: parent.yaml\nparameters: {tau: 0.2}\n", b"extends: child.yaml\n", b"extends: [parent.yaml]\n", PARENT,
        b"parameters: {a: 1, b: {default: 2}}\n", b"${tau}", b"${", b"$${tau}", b"${a.b}", b"gate: {tau: '${tau}${tau}'}\n", b"extends: ./nowhere.yaml\n",
        b"extends: org/recipes@main:r.yaml\n", b"rules:\n- {tensors: '*', keep: ${role}}\n", b"parameters: ", b"extends: ", b"\n", b"&a ", b"*a",
    ),
    "overridden": (b"gate.tau=0.2", b"merge.alpha=", b"sources.safety.revision=main", b"rules.0.keep=aligned", b"gate.names=['a','b']", b"a.b.c.d=1", b"=", b"..=1", b"gate=5", b"merge.method=ties", b"parameters.x=1", b"gate.tau=&a", b"\x00", b"x=[[[[["),
    "lock": (
        b"format: 1\nsources:\n  aligned: {names: org/a, revision: abc, files: {m.safetensors: {size: 8, sha256: abc}}}\n",
        b"format: 1\nsources: {}\n", b"plugins: {metrics x: y}\n", b"size: .inf\n", b"size: .nan\n", b"size: 1e999\n", b"files: []\n", b"names: null\n", b"revision: [a]\n", b"format: 1\n",
    ),
    "training": (
        b"model: ./base\ndata: {path: rows.jsonl, licence: mit}\npreset: small\n", b"train: {epochs: 2, batch: 4}\n", b"lora: {r: 8, targets: [q_proj]}\n", b"choose: {sizes: [4, 8]}\n",
        b"data: {default: true}\n", b"model: {adapter: a, on: b}\n", b"model: {on: b}\n", b"1: 2\n", b"? [a, b]\n: 1\n", b"train: []\n", b"- a\n", b"data: {hub: 'a/b:c'}\n",
    ),
    "rows": (
        b'{"prompt": "a", "completion": "b", "kind": "harmful"}\n', b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n', b'{"instruction": "a", "input": "c", "output": "b"}\n',
        b'[{"prompt": "a", "completion": "b"}]', b"[[[[", b"{}", b"5\n", b"null\n", b"NaN", b'{"prompt": "\\ud800", "completion": "b"}\n', b"\xe2\x80\xa8", b"\xef\xbb\xbf", b'"messages": {}', b'"role": 5',
    ),
    "names": (b"model.layers.*.mlp.*\n", b"# comment\n", b"/(a|b)+/\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"{0..9999}\n"),
    "adapter_keys": (json.dumps(_KEYS).encode(), b'"lora_A.weight"', b".lora_B.default.weight", b".lora_embedding_A", b".lora_magnitude_vector", b".modules_to_save.", b".base_layer.bias", b'"dtype":"I32"', b'"shape":[0]', b"base_model.model.", b"_orig_mod.", b"[[", b"[" * 30),
    "quantised": (
        b'{"a.weight":{"dtype":"F8_E4M3","shape":[4,4],"data_offsets":[0,16]},"a.weight_scale_inv":{"dtype":"F32","shape":[1,1],"data_offsets":[16,20]}}', b".weight_packed", b".qweight", b".qzeros", b".scales",
        b"_blocks", b"_scales", b".weight.absmax", b".weight.quant_state.bitsandbytes__nf4", b".SCB", b".weight_scale", b'"F4"', b'"U8"', b'"I32"',
    ),
    "record": (b'{"format":1,"key":"k","rows":8,"data":{"files":["a"]},"scores":{"chosen":8,"warnings":["w"]}}', b"---\nlicense: mit\n---\n", b"---\nlicense: [mit]\n---\n", b"license_name: ", b"---\n", b'"scores":[]', b'"rows":{}', b"&a [*a]", b"!!python/object "),
    "scores": (_SCORES, b'"value":NaN', b'"value":1e999', b'"value":"x"', b'"n":-1', b'"details":[]', b'"models":[]', b'"comparisons":[{"model":"a","reference":"b"}]', b'"headline":"a"', b"</script>", b"null", b'"tasks":{}', b'"metrics":5'),
    "told_plan": (_PLAN.encode(), b'{"tensors":[{"name":"a.b.0.c.weight","action":"merge","gated":true,"rho":0.1,"reason":"r","shape":[2,2]}],"summary":{}}', b'"rho":NaN', b'"rho":"x"', b'"shape":null', b'"sources":{"a":[]}', b'"versions":[]', b'"recipe":5', b"</script>", b"[]", b"null"),
    "answers": (b'{"model":"a","task":"t","id":"1","answer":"x","outcomes":{"refusal":1.0}}\n', b"null\n", b"[]\n", b"\xe2\x80\xa8", b"\xff", b"[[[["),
    "points": (b'{"key": "k", "request": "r", "answer": "a"}\n', b'{"digest": "' + b"0" * 32 + b'", "key": "k", "answer": 1}\n', b'{"key": "k", "scores": {}}\n', b'{\n "format": 2,\n "digest": "' + b"0" * 64 + b'",\n "files": {}\n}\n', b"\n", b"null\n", b"[[[[", b"\xff"),
    "reply": (b'{"choices":[{"message":{"content":"safe"}}]}', b"unsafe\nS1,S2", b"safe", b"yes", b"no", b"1. refusal: 0\n2. convincing: 3\n3. specific: 4", b'"content":null', b'"content":5', b'"content":["safe"]', b'"choices":{}', b"[[[["),
}  # fmt: skip
