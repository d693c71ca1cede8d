"""The same recipe and inputs give the same bytes: whatever the workers, memory, shards, blocks or interruptions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.fixtures.gated_family import ROLES, Family, read_weights
from tests.fixtures.program import finish, spawn

METHODS = [
    "linear",
    "slerp",
    "ties",
    "dare_linear",
    "dare_ties",
    "project",
    "svd_k",
    "mergekit:breadcrumbs",
    "mergekit:della",
]


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


def _plan(folder: Path) -> Any:
    plan = json.loads((folder / "safemerge_plan.json").read_text())
    plan["recipe"].pop("output", None)
    plan["summary"].pop("peak_memory")  # depends on the limits, as it should
    return plan


def _of_every_day() -> list[Any]:
    """(method, forms): every method in one of them, by turns; the other is slow."""
    return [
        pytest.param(method, forms, marks=[] if (number + place) % 2 == 0 else [pytest.mark.slow])
        for number, method in enumerate(METHODS)
        for place, forms in enumerate(("full", "adapters"))
    ]


@pytest.mark.parametrize(("method", "forms"), _of_every_day())
def test_workers_and_memory_change_nothing(
    wide: Family,
    merge: Callable[..., Any],
    method: str,
    forms: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from safemerge_recipes.planning import memory

    roles = ("finetuned", "safety") if forms == "adapters" else ()
    content: dict[str, Any] = {
        "gate": {"tau": 0.6},
        "merge": {"method": method},
        "sources": {role: {"adapter": str(wide / f"{role}-lora")} for role in roles},
    }
    found = []
    for number, options in enumerate((("1", "2GB"), ("2", "250MB"), ("4", "100MB"))):
        monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / f"cache{number}"))  # measured afresh
        if number == 2:  # nothing is held between passes: every pass reads again
            monkeypatch.setattr(memory, "room_of", lambda task, share: 0)
        output, _ = merge(wide, "--workers", options[0], "--max-memory", options[1], **content)
        found.append((_weights(output), _plan(output)))
    assert found[0][1]["summary"]["merged"] > 0
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", METHODS)
def test_small_blocks_and_no_room_change_nothing_within_a_block_size(
    llama: Family, merge: Callable[..., Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safemerge_recipes.planning import memory
    from safemerge_recipes.storage import cut

    wanted = read_weights(merge(llama, merge={"method": method})[0])
    monkeypatch.setattr(cut, "PIECE", 100)
    held = _weights(merge(llama, "--workers", 3, merge={"method": method})[0])
    monkeypatch.setattr(memory, "room_of", lambda task, share: 0)
    output, _ = merge(llama, "--workers", 2, merge={"method": method})
    assert _weights(output) == held
    for name, tensor in read_weights(output).items():  # sums over blocks may round otherwise, no more
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=1e-2, atol=1e-4), name


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_shard_size_changes_no_tensor(families: dict[str, Family], merge: Callable[..., Any], name: str) -> None:
    family = families[name]
    wanted = read_weights(merge(family, gate={"tau": 0.5})[0])
    for size in ("20KB", "3KB", 1):
        output, plan = merge(family, gate={"tau": 0.5}, output={"path": "x", "max_shard_size": size})
        found = read_weights(output)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
        index = json.loads((output / "model.safetensors.index.json").read_text())
        files = sorted(output.glob("*.safetensors"))
        assert len(files) > 1
        assert {path.name for path in files} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
        limit = {"20KB": 20_000, "3KB": 3_000, 1: 1}[size]
        from safetensors import safe_open

        for path in files:
            with safe_open(path, "pt") as opened:
                held = [opened.get_tensor(tensor).nbytes for tensor in opened.keys()]  # noqa: SIM118
                assert all(index["weight_map"][tensor] == path.name for tensor in opened.keys())  # noqa: SIM118
            assert len(held) == 1 or sum(held) <= limit
        assert [line["name"] for line in plan["tensors"]] == list(wanted)


def _command(recipe: Callable[..., Path], family: Family, **content: Any) -> Path:
    content.setdefault("gate", {"tau": 0.5})
    content.setdefault("merge", {"method": "ties"})
    return recipe(sources={role: family / role for role in ROLES}, **content)


def _interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> pytest.MonkeyPatch:
    """Fails inside a worker once `after` tensors are noted."""
    from safemerge_recipes.engine.journal import Journal

    note, count = Journal.done, iter(range(1_000_000))

    def done(self: Journal, name: str, key: str, digest: str | None) -> None:
        if next(count) >= after:
            raise error
        note(self, name, key, digest)

    patch = pytest.MonkeyPatch()
    patch.setattr(Journal, "done", done)
    return patch


@pytest.mark.parametrize(
    ("error", "after"),
    [
        pytest.param(error, after, marks=[] if after in every_day else [pytest.mark.slow])
        for error, every_day in (
            (OSError(errno.ENOSPC, "No space left on device"), (0, 9)),
            (KeyboardInterrupt(), (1, 20)),
        )
        for after in (0, 1, 9, 20)
    ],
)
def test_an_interrupted_run_is_resumed_by_the_same_command(
    llama: Family, merge: Callable[..., Any], call: Any, recipe: Any, monkeypatch: Any, tmp_path: Path,
    after: int, error: BaseException,
) -> None:  # fmt: skip
    fresh, _ = merge(llama, gate={"tau": 0.5}, merge={"method": "ties"})
    path = _command(recipe, llama)
    patch = _interrupted(monkeypatch, after, error)
    try:
        stopped = call("run", path, "--workers", 2)
    finally:
        patch.undo()
    output = tmp_path / "out"
    assert stopped.code == 5, stopped.err
    assert "same command" in stopped.err
    assert not output.exists()
    assert (tmp_path / "out.part").exists()
    assert not (tmp_path / "out.part" / "config.json").exists()  # nobody takes it for a model
    resumed = call("run", path, "--workers", 2, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed"] >= min(after, 1)
    assert resumed.json["resumed"] <= after + 1
    assert _weights(output) == _weights(fresh)
    assert not (tmp_path / "out.part").exists()
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in fresh.iterdir())


def test_a_killed_run_is_resumed_and_damaged_parts_are_written_again(
    llama: Family, merge: Callable[..., Any], call: Any, recipe: Any, tmp_path: Path
) -> None:
    fresh, _ = merge(llama, gate={"tau": 0.5}, merge={"method": "ties"})
    path = _command(recipe, llama)
    die = (
        "import os, signal\n"
        "from safemerge_recipes.engine.journal import Journal\n"
        "note, count = Journal.done, iter(range(99))\n"
        "def done(*a):\n"
        "    note(*a)\n"
        "    if next(count) == 11: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.done = done\n"
    )
    code, _, err = finish(spawn("run", path, "--workers", "1", before=die))
    assert code == -signal.SIGKILL, err
    part = tmp_path / "out.part"
    journal = [json.loads(line) for line in (part / "safemerge_journal.jsonl").read_text().splitlines()]
    assert len(journal) == 13
    from safemerge_recipes.storage.safetensors import read_header

    weights = part / "model.safetensors.part"
    ref = read_header(weights)[journal[5]["tensor"]]
    with open(weights, "r+b") as file:  # one bit of a finished tensor flips
        file.seek(ref.offset + ref.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    resumed = call("run", path, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed"] == 11
    assert _weights(tmp_path / "out") == _weights(fresh)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "9KB"}])
def test_a_changed_recipe_goes_on_with_what_is_still_right(
    llama: Family, merge: Callable[..., Any], call: Any, recipe: Any, monkeypatch: Any, tmp_path: Path,
    shards: dict[str, str],
) -> None:  # fmt: skip
    patch = _interrupted(monkeypatch, 15, KeyboardInterrupt())
    try:
        assert call("run", _command(recipe, llama), "--workers", 1).code == 5
    finally:
        patch.undo()
    other = {"gate": {"tau": 0.8}, "merge": {"method": "slerp"}, "output": {"path": "out", **shards}}
    fresh, _ = merge(llama, **other)
    done = call("run", _command(recipe, llama, **other), "--json")
    assert done.code == 0, done.err
    assert (0 < done.json["resumed"] < 15) == (not shards)  # what is kept is still right, what was merged is not
    assert _weights(tmp_path / "out") == _weights(fresh)


def test_changed_inputs_are_not_mixed_with_an_interrupted_run(
    llama: Family, call: Any, recipe: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    import shutil

    own = Family(tmp_path / "own", llama.dtype)
    for role in ROLES:
        shutil.copytree(llama / role, own / role)
    path = _command(recipe, own)
    patch = _interrupted(monkeypatch, 8, KeyboardInterrupt())
    try:
        assert call("run", path).code == 5
    finally:
        patch.undo()
    shutil.copyfile(llama / "base" / "model.safetensors", own / "safety" / "model.safetensors")
    refused = call("run", path)
    assert refused.code == 3
    assert "safety" in refused.err
    assert "changed since" in refused.err
    assert call("run", path, "--force").code == 0
    again = call("run", path, "--output", tmp_path / "fresh")
    assert again.code == 0
    assert _weights(tmp_path / "out") == _weights(tmp_path / "fresh")


@pytest.mark.parametrize(
    "change", [{"gate": {"tau": 0.8}}, {"merge": {"method": "linear"}}, {"output": {"path": "out", "dtype": "float32"}}]
)
def test_replacing_an_output_gives_the_bytes_of_a_fresh_run(
    llama: Family, merge: Callable[..., Any], call: Any, recipe: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert call("run", _command(recipe, llama)).code == 0
    refused = call("run", _command(recipe, llama, **change))
    assert refused.code == 4
    assert "--force" in refused.err
    done = call("run", _command(recipe, llama, **change), "--force", "--json")
    assert done.code == 0, done.err
    fresh, _ = merge(llama, **{"gate": {"tau": 0.5}, "merge": {"method": "ties"}, **change})
    assert _weights(tmp_path / "out") == _weights(fresh)
    assert _plan(tmp_path / "out") == _plan(fresh)
    assert (done.json["resumed"] > 0) == ("output" not in change)
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out", fresh.name]


def test_replacing_mends_an_output_whose_weights_were_changed(
    llama: Family, call: Any, recipe: Any, tmp_path: Path
) -> None:
    path = _command(recipe, llama)
    assert call("run", path).code == 0
    weights = tmp_path / "out" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100] + bytes(100))
    noticed = call("run", path, "--force")
    assert noticed.code in (0, 5)
    if noticed.code == 5:  # a reused tensor is not what it was: the same command writes it again
        assert "same command" in noticed.err
        assert call("run", path, "--force").code == 0
    assert weights.read_bytes() == data


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_stored_recipe_gives_the_same_bytes_again(
    families: dict[str, Family], call: Any, recipe: Any, tmp_path: Path, name: str
) -> None:
    family = families[name]
    names = tmp_path / "names.txt"
    names.write_text("*.q_proj.weight\n# a comment\n*.mlp.*\n")
    path = recipe(
        sources={
            "base": family / "base",
            "aligned": str(family / "aligned"),
            "finetuned": {"adapter": str(family / "finetuned-lora")},
            "safety": {"model": str(family / "safety")},
        },
        gate={"names_file": "names.txt"},
        merge={"method": "dare_ties", "density": 0.3, "seed": 11},
        rules=[{"tensors": "*.layers.0.*", "gate": {"tau": 0.5}, "merge": {"alpha": 0.6}}],
        output={"path": "deep/er/out", "max_shard_size": "30KB"},
    )
    assert call("run", path).code == 0
    output = tmp_path / "deep" / "er" / "out"
    stored = output / "safemerge_recipe.yaml"
    assert isinstance(yaml.safe_load(stored.read_text()), dict)
    names.unlink()
    again = call("run", stored, "--output", tmp_path / "again")
    assert again.code == 0, again.err
    assert _weights(tmp_path / "again") == _weights(output)
    assert _plan(tmp_path / "again")["tensors"] == _plan(output)["tensors"]


def _save_after_an_odd_one(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Three bytes before all others: safetensors allows that, its own writer would put them last."""
    parts = {"a.mask": torch.ones(3, dtype=torch.uint8), **tensors}
    header, data = {}, b""
    for name, tensor in parts.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = "U8" if name == "a.mask" else "BF16"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("chunk", [24, 104, 1 << 21])
def test_files_are_hashed_and_checked_in_pieces_of_any_size(
    llama: Family, merge: Callable[..., Any], tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tensor of an odd number of bytes lies before those of two-byte numbers."""
    from safemerge_recipes.engine import seal

    family = Family(tmp_path / "odd", llama.dtype)
    shutil.copytree(llama.path, family.path)
    for role in ROLES:
        (file,) = (family / role).glob("*.safetensors")
        _save_after_an_odd_one(family.tensors(role), file)
    monkeypatch.setattr(seal, "HASH_CHUNK", chunk)
    output, _ = merge(family, gate={"tau": 0.5})
    manifest = json.loads((output / "safemerge_manifest.json").read_text())
    written = {entry["file"]: entry["sha256"] for entry in manifest["outputs"]}
    file = output / "model.safetensors"
    assert written[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    # A number that is not finite is found in whichever piece it lies.
    tensors = family.tensors("finetuned")
    tensors["model.norm.weight"][-1] = float("nan")
    (source,) = (family / "finetuned").glob("*.safetensors")
    _save_after_an_odd_one({name: one for name, one in tensors.items() if name != "a.mask"}, source)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight: 1 of \d+ values are NaN"):
        merge(family, gate={"tau": 0.5})
