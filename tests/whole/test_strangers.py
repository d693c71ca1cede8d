"""Whatever a stranger puts into a source or a recipe ends in one message, with nothing written and nothing run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

from tests.fixtures.program import ROOT, run, snapshot, spawn_cold
from tests.fixtures.sharded_family import CONFIG, LORA, make_adapter, make_family, write_recipe


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path / "models")


def refused(recipe, codes=(2, 3), *, extra=()):
    """Runs the recipe, which must end in one message with nothing written; returns the message."""
    root = recipe.parent
    before = snapshot(root)
    begun = time.perf_counter()
    code, out, err = run("run", recipe, *extra)
    assert time.perf_counter() - begun < 10
    assert code in codes, (code, err)
    assert out == ""
    assert err.startswith("safemerge: ")
    assert sum(line.startswith("safemerge: ") for line in err.splitlines()) == 1
    assert len(err) < 10_000
    assert "Traceback" not in err
    assert "a bug" not in err
    assert all(c.isprintable() or c == "\n" for c in err)
    assert snapshot(root) == before
    return err


# Headers


def entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# As an installed program has it: the working folder is no place to import from.
ELSEWHERE = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}


def stored(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length beyond the file": stored({}, length=10_000),
    "length of 2**64 - 1": stored({}, length=2**64 - 1),
    "length of 2**40": stored({}, length=2**40),
    "no JSON": stored(b"{" * 100),
    "no UTF-8": stored(b'{"\xff": 1}'),
    "a list": stored(b"[]"),
    "deep": stored(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "deep list": stored(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "twice the same": stored(b'{"a":%b,"a":%b}' % ((b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2)),
    "overlap": stored({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "same place": stored({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "gap": stored({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "starts late": stored({"a": entry(8, 16)}, bytes(16)),
    "trailing bytes": stored({"a": entry()}, bytes(9)),
    "truncated": stored({"a": entry()}, bytes(7)),
    "negative": stored({"a": entry(-8, 0)}, bytes(8)),
    "backwards": stored({"a": entry(8, 0)}, bytes(8)),
    "huge": stored({"a": entry(0, 2**62, shape=(2**60,))}, bytes(8)),
    "beyond 64 bit": stored({"a": entry(0, 2**70, shape=(2**68,))}, bytes(8)),
    "product overflows": stored({"a": entry(0, 8, shape=(2**32, 2**32, 2))}, bytes(8)),
    "float offsets": stored({"a": entry(0.0, 8.0)}, bytes(8)),
    "true offsets": stored({"a": entry(False, True, "U8", (1,))}, bytes(1)),
    "string offsets": stored({"a": entry("0", "8")}, bytes(8)),
    "dtype of none": stored({"a": entry(dtype="F31")}, bytes(8)),
    "dtype no text": stored({"a": entry(dtype=["F32"])}, bytes(8)),
    "dtype of another size": stored({"a": entry(dtype="F16")}, bytes(8)),
    "no shape": stored({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "extra key": stored({"a": entry() | {"run": "rm"}}, bytes(8)),
    "forty dimensions": stored({"a": entry(shape=(1,) * 39 + (2,))}, bytes(8)),
    "empty but endless": stored({"a": entry(0, 0, shape=(0, 2**62))}),
    "null": stored({"a": None}),
    "NaN": stored(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "number of a million digits": stored(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "many lists": stored(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
    "control characters in the name": stored({"model.\x1b[2J\x07.weight": entry()}, bytes(8)),
    "line break in the name": stored({"a\nsafemerge: all is well": entry()}, bytes(8)),
    "half a character in the name": stored(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "name of a megabyte": stored({"a" * 1_000_000: entry()}, bytes(8)),
    "no name": stored({"": entry()}, bytes(8)),
    "no tensor": stored({}),
    "metadata alone": stored({"__metadata__": {"format": "pt"}}),
    "a pickle": pickle.dumps({"a": 1}) * 10,
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("where", ["aligned", "adapter"])
def test_unsound_headers(family, what, where):
    root = family.parent
    if where == "aligned":
        for path in (root / "aligned").glob("model*"):
            path.unlink()
        (root / "aligned" / "model.safetensors").write_bytes(HEADERS[what])
    else:
        make_adapter(root / "lora")
        (root / "lora" / "adapter_model.safetensors").write_bytes(HEADERS[what])
        write_recipe(root, sources={"base": "base", "aligned": "aligned", "finetuned": "lora", "safety": "safety"})
    refused(family, (3,))


def test_bad_headers_cost_little_memory(tmp_path):
    worst = {name: HEADERS[name] for name in ("many lists", "deep list", "number of a million digits")}
    worst["many keys"] = stored(b"{" + b",".join(b'"%x":0' % n for n in range(1_400_000)) + b"}")
    for name, data in worst.items():
        path = tmp_path / "model.safetensors"
        path.write_bytes(data)
        text = f"""
import sys
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.errors import SourceError
try:
    read_header({str(path)!r})
except SourceError:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(0)
"""
        out, err = spawn_cold(before=text).communicate(timeout=60)
        assert int(out) * 1024 < 512e6, (name, err)


# Indexes, links, names


def with_index(root, change):
    path = root / "aligned" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index)))


INDEXES = {
    "parent": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "../base/model-00001-of-00003.safetensors")},
    "absolute": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "/etc/passwd")},
    "another name": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "config.json")},
    "manifest": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "safemerge_manifest.json")},
    "backslash": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "..\\x.safetensors")},
    "zero byte": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "a\0.safetensors")},
    "escape": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "\x1b]0;x\x07.safetensors")},
    "long": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "a" * 5000 + ".safetensors")},
    "numbers": lambda i: {"weight_map": dict.fromkeys(i["weight_map"], 7)},
    "list": lambda i: {"weight_map": [1, 2]},
    "nothing": lambda i: {},
    "a list itself": lambda i: [],
    "missing tensor": lambda i: {"weight_map": i["weight_map"] | {"a\n\x1b[31m": "model-00001-of-00003.safetensors"}},
    "missing file": lambda i: {"weight_map": i["weight_map"] | {"ghost": "ghost.safetensors"}},
    "swapped": lambda i: {"weight_map": dict(zip(i["weight_map"], [*i["weight_map"].values()][::-1], strict=True))},
}  # fmt: skip


@pytest.mark.parametrize("what", INDEXES)
def test_indexes_that_lie_or_lead_out(family, what):
    with_index(family.parent, INDEXES[what])
    refused(family, (3,))


@pytest.mark.parametrize("file", ["model-00001-of-00003.safetensors", "config.json", "tokenizer.json"])
def test_links_that_lead_out_of_a_source_are_refused(family, tmp_path, file):
    secret = tmp_path / "secret"
    target = family.parent / "finetuned" / file
    target.rename(secret)
    target.symlink_to(secret)
    assert "leads out" in refused(family, (3,))


def test_the_hub_caches_own_links_are_followed(family, tmp_path):
    root = family.parent
    snapshot_ = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot_.mkdir(parents=True)
    blobs.mkdir()
    for path in (root / "finetuned").iterdir():
        path.rename(blobs / path.name)
        (snapshot_ / path.name).symlink_to(blobs / path.name)
    write_recipe(root, sources={"base": "base", "aligned": "aligned", "finetuned": str(snapshot_), "safety": "safety"})
    code, _, err = run("run", family)
    assert code == 0, err
    assert not any(path.is_symlink() for path in (root / "out").iterdir())


def test_side_files_with_unprintable_names_are_refused(family):
    (family.parent / "finetuned" / "notes\x1b[2J\n.txt").write_text("x")
    refused(family, (3,))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '"x"', "{", "[" * 100_000, '{"model_type": "A' + "B" * 3_000_000 + '"}',
     '{"model_type": "\\u001b[2J\\n"}',
     "\x00" * 100, '{"a":' + "1" * 100_000 + "}"],
)  # fmt: skip
def test_configs(family, text):
    (family.parent / "finetuned" / "config.json").write_text(text)
    refused(family, (3,))


# Adapters

ADAPTERS = {
    "rank of another": {"r": 5},
    "rank absurd": {"r": 10**18},
    "rank negative": {"r": -4},
    "rank zero": {"r": 0},
    "rank true": {"r": True},
    "rank text": {"r": "four\x1b[2J"},
    "rank list": {"r": [4]},
    "rank of many digits": {"r": 10**4000},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha of many digits": {"lora_alpha": 10**400},
    "alpha text": {"lora_alpha": "8"},
    "alpha null": {"lora_alpha": None},
    "alpha true": {"lora_alpha": True},
    "pattern that backtracks": {"rank_pattern": {"(a+)+$": 4, "(.*)*x": 4}},
    "pattern that backtracks elsewhere": {"alpha_pattern": {"(l|la|lay)+(e|er)+s$": 4}},
    "pattern of alternatives": {"alpha_pattern": {"(.|..|...)" * 60 + "x": 4}},
    "pattern long": {"rank_pattern": {"(" * 5000: 4}},
    "pattern broken": {"rank_pattern": {"[": 4}},
    "pattern breaks out": {"rank_pattern": {"a)|(?:b": 4, "*": 3}},
    "patterns many": {"rank_pattern": {f"x{n}.*y$": 4 for n in range(100_000)}},
    "patterns a list": {"rank_pattern": [1]},
    "patterns a text": {"alpha_pattern": "q_proj"},
    "pattern value": {"rank_pattern": {"q_proj": {"r": 4}}},
    "another kind": {"peft_type": "IA3"},
    "kind no text": {"peft_type": {"a": 1}},
    "kind absurd": {"peft_type": "X" * 1_000_000},
    "base changed": {"init_lora_weights": "pissa" + "!" * 100_000},
    "DoRA no boolean": {"use_dora": "false"},
    "rsLoRA no boolean": {"use_rslora": "false"},
    "unknown field": {"run_this": "os.system('x')"},
    "bias": {"bias": ["all"] * 1000},
}  # fmt: skip


@pytest.mark.parametrize("what", ADAPTERS)
def test_adapter_configs(family, what):
    root = family.parent
    make_adapter(root / "lora", LORA | ADAPTERS[what])
    write_recipe(root, sources={"base": "base", "aligned": "aligned", "finetuned": "lora", "safety": "safety"})
    refused(family)


def test_everyday_patterns_of_adapters_are_looked_up_as_peft_does(family):
    root = family.parent
    table = {"(gate|up)_proj": 9, r".*\.self_attn\.q_proj": 3, "q_proj": 5}
    make_adapter(root / "lora", LORA | {"alpha_pattern": table, "r": 4})
    from safemerge_recipes.sources.peft.adapter import open_adapter

    scale = open_adapter(root / "lora").config.scale("model.layers.0.self_attn.q_proj", 4)
    assert scale == 3 / 4  # the first key in the config's order


@pytest.mark.parametrize("shape", [(0, 32), (4, 31), (4, 0), (32,), (1, 4, 32)])
def test_adapter_shapes(family, shape):
    root = family.parent
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    make_adapter(
        root / "lora",
        LORA,
        {f"{module}.lora_A.weight": torch.ones(shape), f"{module}.lora_B.weight": torch.ones(32, 4)},
    )
    write_recipe(root, sources={"base": "base", "aligned": "aligned", "finetuned": "lora", "safety": "safety"})
    refused(family, (3,))


# Recipes

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
RECIPES = {
    "empty": "",
    "a bomb of aliases": BOMB,
    "holds itself": "sources: &a {b: *a}",
    "a tag that runs": "sources: !!python/object/apply:os.system ['touch canary']",
    "a tag that builds": "sources: !!python/name:os.system",
    "a local tag": "sources: !include /etc/passwd",
    "a key of 10 MB": "k" * 10_000_000 + ": 1",
    "a key of 900 kB": "k" * 900_000 + ": 1",
    "deep flow": "sources: " + "[" * 100_000,
    "deep block": "\n".join(" " * n + "a:" for n in range(1000)),
    "deep quotes": "a: '" + "''" * 400_000,
    "many keys": "\n".join(f"k{n}: 1" for n in range(100_000)),
    "merge keys": "sources: {<<: {<<: {a: 1}}}",
    "two documents": "a: 1\n---\nb: 2",
    "zero byte": "a: \0",
    "escape": 'a: "\\e[2J"',
    "bell in a key": '"\\a\\e]0;x": 1',
    "half a character": 'a: "\\ud800"',
    "beyond Unicode": 'a: "\\UFFFFFFFF"',
    "a list": "- 1",
    "a text": "just text",
    "number of many digits": "gate: {tau: " + "9" * 100_000 + "}",
    "timestamps": "gate: {tau: 2001-12-14t21:59:43.10-05:00}",
    "binary": "sources: !!binary aGFsbG8=",
    "pattern that backtracks": 'gate: {tau: 1, scope: ["/(a+)+$/"]}',
    "braces without end": 'gate: {tau: 1, scope: ["' + "{a,b}" * 100 + '"]}',
    "extends itself": "extends: ./recipe.yaml",
    "comments": "#" * 900_000,
    "colons": ": " * 300_000,
    "dashes": "- " * 300_000,
    "question marks": "? " * 300_000,
    "anchors": "".join(f"- &a{n} x\n" for n in range(100_000)),
    "no UTF-8": b"a: \xff\xfe",
    "UTF-16": "a: 1".encode("utf-16"),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("what", RECIPES)
def test_recipes(tmp_path, what):
    recipe = tmp_path / "recipe.yaml"
    text = RECIPES[what]
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    refused(recipe, (2,))


@pytest.mark.parametrize(
    "name", ["../../../etc", "/dev/null", "/dev/zero", "a\x1b[2Jb", "x" * 5000, "~nobody-here/x", "https://u:p@h/x/y"]
)
def test_source_names(family, name):
    write_recipe(family.parent, sources={"base": "base", "aligned": "aligned", "finetuned": name, "safety": "safety"})
    refused(family)


def test_a_recipe_that_is_a_pipe_or_folder_does_not_hang(tmp_path):
    refused_codes = {run("run", tmp_path)[0], run("run", "/dev/null")[0]}
    assert refused_codes == {2}


# Numbers


@pytest.mark.parametrize("role", ["base", "aligned", "finetuned", "safety"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(family, role, value, tensor):
    from safetensors.torch import load_file

    root = family.parent
    index = json.loads((root / role / "model.safetensors.index.json").read_text())
    file = root / role / index["weight_map"][tensor]
    tensors = load_file(file)
    tensors[tensor][3, 4:7] = value
    save_file(tensors, file)
    used = role == "finetuned" or "up_proj" in tensor
    for gate in ("gate.tau=0.6", "gate.always=true"):
        if not used or (role == "base" and gate != "gate.tau=0.6"):
            continue
        err = refused(family, (3,), extra=("--set", gate)) if (role, gate) != ("safety", "gate.tau=0.6") else None
        if err:
            assert tensor in err
            assert "3 " in err


# Nothing is executed


def test_nothing_of_a_source_is_executed_or_unpickled(family, tmp_path, monkeypatch):
    root, canary = family.parent, tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').write('ran')\n"

    class Bomb:
        def __reduce__(self):
            return exec, (code,)

    for role in ("base", "aligned", "finetuned", "safety"):
        folder = root / role
        for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py",
                     "sitecustomize.py", "torch.py", "numpy.py", "yaml.py", "json.py", "safetensors.py"):  # fmt: skip
            (folder / name).write_text(code)
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "tokenizer.pkl",
                     "adapter_model.bin", "scheduler.pt"):  # fmt: skip
            (folder / name).write_bytes(pickle.dumps(Bomb()))
        auto = {"AutoConfig": "configuration_evil.E", "AutoModelForCausalLM": "modeling_evil.E",
                "AutoTokenizer": ["tokenization_evil.E", None]}  # fmt: skip
        (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": auto, "trust_remote_code": True}))
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "E",
                    "auto_map": auto,
                    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
                }
            )
        )
        (folder / "chat_template.jinja").write_text("{% for c in [].__class__.__base__.__subclasses__() %}{% endfor %}")
    make_adapter(root / "lora")
    (root / "lora" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    (root / "lora" / "evil.py").write_text(code)
    monkeypatch.chdir(root / "finetuned")  # as if the user stood in a stranger's folder
    text = f"import os; os.chdir({str(root / 'finetuned')!r})"
    for sources in (None, {"base": "base", "aligned": "aligned", "finetuned": "lora", "safety": "safety"}):
        recipe = write_recipe(root, sources=sources)
        _, err = spawn_cold("run", recipe, "--force", before=text, env=ELSEWHERE).communicate(timeout=60)
        assert (root / "out").is_dir(), err
        assert run("verify", root / "out", "--deep")[0] == 0
        assert not canary.exists()
    names = {path.name for path in (root / "out").rglob("*")}
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)


def test_a_pickled_model_is_refused_and_not_opened(family, tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    for path in (family.parent / "finetuned").glob("model*"):
        path.unlink()
    (family.parent / "finetuned" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in refused(family, (3,))
    assert not canary.exists()


# Secrets, places, permissions

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123"


@pytest.mark.parametrize("verb", ["fails", "works"])
def test_tokens_reach_no_output_and_no_message(family, monkeypatch, verb):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    root = family.parent
    if verb == "fails":
        for name in (f"https://user:{TOKEN}@huggingface.co/a/b", f"https://user:s3cret@host/a/b/{TOKEN}", f"a/{TOKEN}"):
            write_recipe(root, sources={"base": "base", "aligned": "aligned", "finetuned": name, "safety": "safety"})
            code, out, err = run("run", family)
            assert code in (2, 3)
            assert TOKEN not in out + err
            assert "s3cret" not in out + err
    else:
        code, out, err = run("run", family, "--json")
        assert code == 0
        assert TOKEN not in out + err
        for path in (root / "out").rglob("*"):
            assert TOKEN.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("mask", "mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_files_get_the_users_permissions(family, mask, mode, folder_mode):
    extra = family.parent / "finetuned" / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool.jinja").write_text("x")
    old = os.umask(mask)
    try:
        assert run("run", family)[0] == 0
    finally:
        os.umask(old)
    out = family.parent / "out"
    for path in out.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else mode), path
    assert stat.S_IMODE(out.stat().st_mode) == folder_mode


def test_nothing_is_written_outside_output_and_cache(family, tmp_path, own_cache):
    """In a process of its own, with home, temporary folder and working folder under watch."""
    places = {name: tmp_path / name for name in ("home", "temporary", "here")}
    for place in places.values():
        place.mkdir()
    env = {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["temporary"]),
        "SAFEMERGE_CACHE": str(own_cache),
        **ELSEWHERE,
    }
    before = {name: snapshot(tmp_path / name) for name in ("models", *places)}
    text = f"import os; os.chdir({str(places['here'])!r}); import sys; sys.dont_write_bytecode = True"
    new = tmp_path / "new" / "out"
    _, err = spawn_cold("run", family, "--output", new, before=text, env=env).communicate(timeout=60)
    assert new.is_dir(), err
    assert {name: snapshot(tmp_path / name) for name in ("models", *places)} == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


# The cache


def test_damaged_cache_entries_are_as_good_as_none(family, own_cache):
    from tests.fixtures.program import digests

    assert run("run", family)[0] == 0
    expected = digests(family.parent / "out")
    entries = sorted(path for path in own_cache.rglob("*.json"))
    assert any("measures" in str(path) for path in entries)
    damages = [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"[" * 100_000,
        lambda data: b"[]",
        lambda data: data.replace(b"0.", b"1."),
        lambda data: json.dumps({**json.loads(data), "value": [1, 2]}).encode(),
        lambda data: b"\xff\xfe" + data,
    ]
    whole = {path: path.read_bytes() for path in entries}
    for damage in damages:
        for path, data in whole.items():
            path.write_bytes(damage(data))
        code, _, err = run("run", family, "--output", family.parent / "again")
        assert code == 0, err
        assert digests(family.parent / "again") == expected
        shutil.rmtree(family.parent / "again")


@pytest.mark.parametrize("broken", ["file", "read-only"])
def test_a_cache_that_cannot_be_written_is_no_error(family, own_cache, monkeypatch, broken):
    place = own_cache / "x"
    if broken == "file":
        place.write_text("in the way")
    else:
        monkeypatch.setattr(
            "safemerge_recipes.storage.files.os.replace",
            lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "denied")),
        )
    if broken == "file":
        monkeypatch.setenv("SAFEMERGE_CACHE", str(place))
        assert run("run", family)[0] == 0
    else:
        from safemerge_recipes.storage.cache import recall, remember

        remember("digests", "k", "v")
        assert recall("digests", "k") is None
        assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_many_writers_of_one_cache_entry_leave_a_whole_one(own_cache):
    import threading

    from safemerge_recipes.storage.cache import recall, remember

    wrong, stop = [], threading.Event()

    def write(number):
        while not stop.is_set():
            remember("measures", "key", {str(n): number for n in range(200)})

    def read():
        while not stop.is_set():
            found = recall("measures", "key")
            if found is not None and len(set(found.values())) != 1:
                wrong.append(found)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert recall("measures", "key") is not None
