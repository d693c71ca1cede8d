# ruff: noqa: E501  # pieces of formats are easier to read on one line
"""What is fuzzed: one function for each reader of foreign bytes, and seeds that bring a fuzzer near its format.

A target returns normally or raises the errors that a user is meant to see; anything else is a finding. Readers
of folders get theirs from a memory file system where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from fuzz import readers
from fuzz.places import place, stored, tensor
from safemerge_recipes.engine.journal import read_journal
from safemerge_recipes.engine.manifest import read_manifest
from safemerge_recipes.errors import CheckError, RecipeError, SafemergeError, SourceError
from safemerge_recipes.recipe.loading import parse_recipe
from safemerge_recipes.recipe.patterns import compile_patterns
from safemerge_recipes.recipe.writing import dump_recipe
from safemerge_recipes.sources.checkpoint import open_checkpoint
from safemerge_recipes.sources.peft.adapter import open_adapter
from safemerge_recipes.storage.safetensors import read_header

CONFIG = b'{"model_type":"llama"}'


def _write(**files: bytes) -> Path:
    folder = place()
    for name, data in files.items():
        (folder / FILES[name]).write_bytes(data)
    return folder


FILES = {
    "weights": "model.safetensors",
    "shard": "a.safetensors",
    "config": "config.json",
    "index": "model.safetensors.index.json",
    "lora": "adapter_model.safetensors",
    "lora_config": "adapter_config.json",
    "journal": "safemerge_journal.jsonl",
    "manifest": "safemerge_manifest.json",
}


def header(data: bytes) -> None:
    """A whole weight file: length, header and data."""
    path = _write(weights=data) / FILES["weights"]
    try:
        refs = read_header(path)
    except SourceError:
        return
    end = len(data)
    assert all(0 <= ref.offset <= ref.offset + ref.nbytes <= end for ref in refs.values())
    assert sum(ref.nbytes for ref in refs.values()) <= end
    assert all(name.isprintable() for name in refs)


def header_text(data: bytes) -> None:
    """The JSON of a header, with a length that fits and sixteen bytes of data."""
    header(stored(data, bytes(16)))


_SHARD = stored({"a": tensor(0, 2), "b": tensor(8, 2)}, bytes(16))


def index(data: bytes) -> None:
    """An index beside a sound shard, then a config beside both."""
    folder = _write(index=data, config=CONFIG, shard=_SHARD)
    (folder / FILES["weights"]).unlink(missing_ok=True)
    try:
        checkpoint = open_checkpoint(folder)
    except SourceError:
        return
    assert all(Path(file).parent == folder for file in checkpoint.files)


def config(data: bytes) -> None:
    """A config.json beside sound weights."""
    folder = _write(config=data, weights=_SHARD)
    try:
        assert isinstance(open_checkpoint(folder).tied, bool)
    except SourceError:
        return


_MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
_LORA = stored({f"{_MODULE}.lora_A.weight": tensor(0, 2, 3), f"{_MODULE}.lora_B.weight": tensor(24, 4, 2)}, bytes(56))


def adapter(data: bytes) -> None:
    """An adapter_config.json beside sound factors."""
    folder = _write(lora_config=data, lora=_LORA)
    try:
        config = open_adapter(folder).config
        assert math.isfinite(config.scale("model.layers.0.self_attn.q_proj", 2))
        assert all(config.names(field) is not None for field in ("modules_to_save", "target_parameters"))
        assert all(row >= 0 for row in config.token_indices("model.embed_tokens"))
    except (SourceError, RecipeError):
        return


def recipe(data: bytes) -> None:
    """Recipe text; what is accepted is written and read back to the same recipe."""
    try:
        loaded = parse_recipe(data.decode("utf-8"))
    except (RecipeError, UnicodeDecodeError):
        return
    assert parse_recipe(dump_recipe(loaded.recipe)).recipe == loaded.recipe


_NAMES = ("model.layers.10.self_attn.q_proj.weight", "lm_head.weight", "a" * 80, "", "a.b\\c[d]{e}")


def patterns(data: bytes) -> None:
    """A pattern, matched against several names."""
    try:
        matcher = compile_patterns(data.decode("utf-8", "replace"))
        matcher.select(_NAMES)
    except (ValueError, RecipeError):
        return


def journal(data: bytes) -> None:
    """A journal."""
    path = _write(journal=data) / FILES["journal"]
    found, entries = read_journal(path)
    assert found is None or isinstance(found, dict)
    assert all(isinstance(name, str) and isinstance(key, str) for name, (key, _) in entries.items())


def manifest(data: bytes) -> None:
    """A manifest, as `verify` reads it."""
    folder = _write(manifest=data)
    try:
        found = read_manifest(folder)
    except CheckError:
        return
    for name in found.outputs:
        assert (folder / name).resolve().is_relative_to(folder.resolve())


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (header, header_text, index, config, adapter, recipe, patterns, journal, manifest)
} | readers.TARGETS
EXPECTED = SafemergeError
"""What a target may let through to the user; all of them catch their own."""

# Pieces of the formats, for building and mutating cases.
DICTIONARY: Mapping[str, tuple[bytes, ...]] = {
    "header": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b'"data_offsets":[', b"__metadata__", b"\x00" * 8),
    "header_text": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        b'{"a":{"dtype":"BF16","shape":[2,4],"data_offsets":[0,16]}}', b'"__metadata__":{"format":"pt"},', b"-1", b"1e9",
        b"18446744073709551616", b"NaN", b"true", b"null", b"[]", b"{}", b'"\\ud800"', b'"F4"', b'"C64"', b"[0,0]",
    ),
    "index": (
        b'{"metadata":{},"weight_map":{"a":"a.safetensors","b":"a.safetensors"}}', b"../", b"/etc/passwd", b"\\u0000",
        b".safetensors", b'"weight_map":', b"model.safetensors", b"[]", b"null", b"..", b"\\ud800",
    ),
    "config": (
        b'{"model_type":"llama","tie_word_embeddings":true}', b'"quantization_config":{}', b'"text_config":', b"[]", b"NaN",
        b"1e999", b'{"text_config":{"tie_word_embeddings":false}}',
    ),
    "adapter": (
        b'{"peft_type":"LORA","r":2,"lora_alpha":4}', b'{"peft_type":"LORA","r":2,"lora_alpha":4,"use_rslora":true}',
        b'"rank_pattern":{"q_proj":2}', b'"alpha_pattern":{".*q_proj":8}', b'"(a+)+$"', b"NaN", b"Infinity", b"1e400",
        b'"init_lora_weights":"pissa"', b'"use_dora":true', b'"bias":"all"', b"true", b"null", b"[]", b"-1", b'"fan_in_fan_out":1',
    ),
    "recipe": (
        b"sources: {aligned: a, finetuned: f, base: b, safety: s}\ngate: {tau: 0.35}\nmerge: {method: linear, alpha: 0.8}\n",
        b"rules:\n- {tensors: '*.q_proj*', keep: finetuned}\n", b"gate: {fraction: 0.5, per: module}\n", b"&a ", b"*a",
        b"!!python/object/apply:os.system ", b"<<: ", b"output: {path: out, max_shard_size: 5GB}\n", b"? ", b"- ", b"|\n",
        b"gate: {random: {count: 28, seed: 0}}\n", b"gate: {complement: {tau: 0.3}}\n", b"merge: {method: ties, density: 0.5}\n",
        b"evaluate: {tasks: [gsm8k]}\n", b"{a: {a: {a: ", b"'", b'"\\x', b"---\n", b"%YAML 1.1\n", b".inf", b"0x", b"1e-4",
    ),
    "patterns": (
        b"model.layers.{0..3}.*", b"/.*q_proj.*/", b"{a,b}", b"[!a-z]", b"/(a|b)+/", b"/(?:x*)*/", b"{0..9999}", b"\\", b"(?=",
        b"(?P<n>", b"\\1", b"{2,}", b"*" * 9, b"/(aa|a)(aa|a)(aa|a)(aa|a)c/", b"[[:", b"(?i)", b"/.*.*.*.*x/", b"(?<=a)",
    ),
    "journal": (
        b'{"format":1,"engine":1,"inputs":{}}\n', b'{"tensor":"a","key":"k","digest":null}\n',
        b'{"tensor":["a"],"key":"k","digest":"d"}\n', b"\n", b"{}\n", b"null\n",
    ),
    "manifest": (
        b'{"format":1,"engine":1,"inputs":[{"roles":["base"],"file":"m","size":1,"sha256":"' + b"0" * 64 + b'"}],"outputs":'
        b'[{"file":"config.json","size":22,"sha256":"' + b"a" * 64 + b'"}],"tensors":{"a":["k","d"]}}',
        b'"file":"../x"', b'"file":"/x"', b'"file":"a/../../x"', b'"tensors":[]', b'"size":-1', b'"outputs":{}', b"1e400",
        b'"\\ud800"', b'"file":""', b'"file":"."',
    ),
    **readers.DICTIONARY,
}  # fmt: skip


def seeds(name: str) -> tuple[bytes, ...]:
    """Sound and nearly sound inputs of a target: the corpus's files and the first pieces of its dictionary."""
    folder = Path(__file__).parent / "corpus" / name
    files = tuple(path.read_bytes() for path in sorted(folder.glob("*"))) if folder.is_dir() else ()
    extra = (_SHARD, _LORA) if name == "header" else ()
    return (*files, *extra, *DICTIONARY[name])
