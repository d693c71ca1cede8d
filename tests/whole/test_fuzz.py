"""Every reader of foreign bytes against random structures: only the errors that users are meant to see come out."""

from __future__ import annotations

import json
import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import targets
from fuzz.run import mutated
from fuzz.targets import DICTIONARY, TARGETS, seeds

settings.register_profile(
    "fuzz",
    max_examples=200,
    deadline=None,
    derandomize=True,  # the same cases on every machine
    database=None,
    suppress_health_check=list(HealthCheck),
)
FUZZ = settings.get_profile("fuzz")

NUMBERS = st.one_of(
    st.integers(-2, 70), st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]), st.floats(),
    st.booleans(), st.none(), st.text(max_size=3),
)  # fmt: skip
NAMES = st.one_of(
    st.text(max_size=8), st.sampled_from(["a", "b", "__metadata__", "a.weight", "\x1b[2J", "\ud800", ".."])
)
ANYTHING = st.recursive(
    NUMBERS | NAMES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4)
)
DTYPES = st.one_of(st.sampled_from(["F32", "BF16", "U8", "F4", "F8_E4M3", "C64", "BOOL"]), NAMES, NUMBERS)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"dtype": DTYPES, "shape": st.lists(NUMBERS, max_size=3), "data_offsets": st.lists(NUMBERS, max_size=3)}
    ),
    ANYTHING,
)


def as_json(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_their_mutations(name):
    dice, pool = random.Random(name), list(seeds(name))
    for data in pool:
        TARGETS[name](data)
    for _ in range({"patterns": 150, "scores": 200, "told_plan": 200, "overridden": 300}.get(name, 1000)):
        TARGETS[name](mutated(dice, pool, DICTIONARY[name]))


@FUZZ
@given(st.dictionaries(NAMES, ENTRIES, max_size=4), st.binary(max_size=64), st.integers(-9, 9))
def test_headers(header, data, off):
    text = as_json(header)
    targets.header(struct.pack("<Q", max(0, len(text) + off)) + text + data)


@FUZZ
@given(st.data())
def test_sound_headers_are_read_back(data):
    """Oracle: the reference reader."""
    import safetensors

    shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
    header, at = {}, 0
    for number, shape in enumerate(shapes):
        size = 2
        for n in shape:
            size *= n
        header[f"t{number}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    blob = targets.stored(header, bytes(range(256)) * (at // 256 + 1) if at else b"")[
        : 8 + len(json.dumps(header)) + at
    ]
    cut = data.draw(st.sampled_from([len(blob), len(blob), max(0, len(blob) - 1)]))
    path = targets._write(weights=blob[:cut]) / "model.safetensors"
    from safemerge_recipes.errors import SourceError
    from safemerge_recipes.storage.safetensors import read_header

    try:
        with safetensors.safe_open(path, "np") as file:
            expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError:
        with pytest.raises(SourceError):
            read_header(path)
    else:
        assert {name: ref.shape for name, ref in read_header(path).items()} == expected


@FUZZ
@given(st.one_of(ANYTHING, st.fixed_dictionaries({"weight_map": st.dictionaries(NAMES, NAMES, max_size=4) | ANYTHING})))
def test_indexes(index):
    targets.index(as_json(index))


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["model_type", "quantization_config", "text_config", "tie_word_embeddings"]), ANYTHING
    )
)
def test_configs(config):
    targets.config(as_json(config))


FIELDS = ["peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias",
          "init_lora_weights", "base_model_name_or_path", "use_dora", "target_modules", "modules_to_save", "lora_bias",
          "trainable_token_indices", "target_parameters"]  # fmt: skip
PATTERN = st.text(alphabet="ab.*+?(){}[]|^$\\d,2q_proj", max_size=20)


@FUZZ
@given(
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=5),
    st.dictionaries(PATTERN, NUMBERS, max_size=4),
    st.booleans(),
)
def test_adapter_configs(changes, table, sound):
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": table} if sound else {}
    targets.adapter(as_json(base | changes if sound else changes))


@FUZZ
@given(
    st.dictionaries(st.sampled_from(["sources", "gate", "merge", "rules", "output", "evaluate", "name", "x"]), ANYTHING)
)
def test_recipes_of_any_structure(recipe):
    whole = {"sources": {"aligned": "a", "finetuned": "f", "base": "b"}, "gate": {"tau": 0.3}} | recipe
    targets.recipe(as_json(whole))


@FUZZ
@given(st.text(alphabet="ab: -\n[]{}&*!|>'\"#?%@,0.~<\t", max_size=60))
def test_recipes_of_any_text(text):
    targets.recipe(text.encode())


@FUZZ
@given(st.text(alphabet="ab*?[]{},.!\\0129-", max_size=24), st.booleans(), PATTERN)
def test_patterns(glob, expression, body):
    targets.patterns((f"/{body}/" if expression else glob).encode())


@FUZZ
@given(st.lists(ANYTHING, max_size=4), st.binary(max_size=20))
def test_journals(lines, tail):
    head = as_json({"format": 1, "engine": 1, "inputs": {}}) + b"\n"
    targets.journal(head + b"".join(as_json(line) + b"\n" for line in lines) + tail)


STAMP = st.fixed_dictionaries(
    {"file": NAMES, "size": NUMBERS, "sha256": st.sampled_from(["0" * 64, "g" * 64]) | ANYTHING}
)


@FUZZ
@given(st.lists(STAMP | ANYTHING, max_size=3), st.dictionaries(NAMES, ANYTHING, max_size=3) | ANYTHING, ANYTHING)
def test_manifests(outputs, tensors, engine):
    targets.manifest(as_json({"format": 1, "engine": engine, "inputs": [], "outputs": outputs, "tensors": tensors}))
    targets.manifest(as_json({"format": 1, "engine": 1, "inputs": [], "outputs": outputs, "tensors": {}}))
