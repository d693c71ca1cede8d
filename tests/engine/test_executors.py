"""What every executor must do: the same bytes, go on where it was stopped, tell what happens, keep to its memory.

It refuses what is broken.

Guards `engine.executor`, `engine.executors.threads`, `engine.produce`, `engine.store` and `engine.local_store`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safemerge_recipes.engine.executor import Executor, Sealed
from safemerge_recipes.engine.executors import find
from safemerge_recipes.engine.executors.threads import LOCAL
from safemerge_recipes.engine.journal import JOURNAL_FILE, Journal, read_journal
from safemerge_recipes.engine.local_store import LocalStore
from safemerge_recipes.engine.resume import finished
from safemerge_recipes.engine.seal import HASH_CHUNK, Sealer
from safemerge_recipes.errors import RecipeError, SourceError, WriteError
from safemerge_recipes.events import BytesDone, Event, FileSealed, TensorDone, ignore
from safemerge_recipes.pipeline.writing import carry_out
from safemerge_recipes.planning.graph import ENGINE, task_memory
from safemerge_recipes.planning.memory import projected_peak
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.storage.digests import Digests
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.workers import Resources
from tests.fixtures.own_memory import OwnMemory
from tests.fixtures.plain_family import (
    ADAPTERS,
    FULL,
    make_family,
    prepare_recipe,
    random_model,
    recipe_text,
    write_model,
)
from tests.fixtures.ray_cluster import cluster

EXECUTORS = ["local", pytest.param("ray", marks=pytest.mark.slow)]
MERGES = {
    "linear": "{method: linear, alpha: 0.8}",
    "ties": "{method: ties, alpha: 0.8, density: 0.5}",
    "dare_linear": "{method: dare_linear, alpha: 0.8, density: 0.5, seed: 3}",
    "slerp": "{method: slerp, alpha: 0.8}",
    "project": "{method: project}",
}
GATE = "{tau: 0.7}"
SHARDS = "output: {max_shard_size: 5KB}"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster that this process is connected to."""
    with cluster() as found:
        yield found


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Executor:
    """Each executor in turn."""
    if request.param == "ray":
        request.getfixturevalue("two_nodes")
    return find(request.param)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's folder."""
    path = tmp_path_factory.mktemp("family")
    make_family(path, torch.bfloat16)
    return path


def _prepared(root: Path, sources: str = FULL, merge: str = MERGES["linear"]) -> Prepared:
    found: Prepared = prepare_recipe(root, recipe_text(sources, GATE, merge, SHARDS))
    return found


def _run(
    executor: Executor,
    prepared: Prepared,
    folder: Path,
    listen: Callable[[Event], None] = ignore,
) -> Sealed:
    """Carries out the graph in a folder, or goes on with it."""
    folder.mkdir(exist_ok=True)
    graph, header = prepared.graph, {"engine": ENGINE, "inputs": {}}
    store = LocalStore(folder, graph.layout)
    done = finished(folder, store, graph, header, False)
    keys = {task.slot.name: task.key for task in graph.tasks}
    journal = Journal(folder / JOURNAL_FILE, header, {name: (keys[name], digest) for name, digest in done.items()})
    try:
        return executor.run(graph, store, prepared.resources, done, journal, listen)
    finally:
        journal.close()


def _weights(folder: Path) -> dict[str, bytes]:
    assert not list(folder.glob("*.part"))
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def _values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("sources", [FULL, ADAPTERS], ids=["checkpoints", "adapters"])
@pytest.mark.parametrize("merge", MERGES)
def test_the_same_bytes_as_one_local_thread(
    executor: Executor, root: Path, tmp_path: Path, merge: str, sources: str
) -> None:
    prepared = _prepared(root, sources, MERGES[merge])
    assert len(prepared.graph.layout.files) > 2
    alone = replace(prepared, resources=replace(prepared.resources, workers=1))
    _run(LOCAL, alone, tmp_path / "expected")
    sealed = _run(executor, prepared, tmp_path / "found")
    found = _weights(tmp_path / "found")
    assert found == _weights(tmp_path / "expected")
    assert sealed.files == {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    for file in found:
        with safe_open(tmp_path / "found" / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                content = opened.get_tensor(name).view(torch.uint8).numpy().tobytes()
                assert sealed.tensors[name] == xxhash.xxh3_128_hexdigest(content)
    assert set(sealed.tensors) == set(prepared.graph.layout.slots)


def test_many_workers_have_several_files_sealed_at_a_time(root: Path, tmp_path: Path) -> None:
    many, alone = (replace(_prepared(root), resources=Resources(workers, 2_000_000_000)) for workers in (16, 1))
    expected = _run(LOCAL, alone, tmp_path / "expected")
    found = _run(LOCAL, many, tmp_path / "found")
    sealer = Sealer(LocalStore(tmp_path, many.graph.layout), many.graph, threading.Event(), ignore, 16)
    assert (len(sealer._threads), sealer.chunk * len(sealer._threads) <= HASH_CHUNK) == (5, True)
    assert found == expected
    assert [*found.files] == [*expected.files]
    assert [*found.tensors] == [*expected.tensors]
    assert _weights(tmp_path / "found") == _weights(tmp_path / "expected")


def test_linear_is_what_the_formula_says(executor: Executor, root: Path, tmp_path: Path) -> None:
    prepared = _prepared(root)
    _run(executor, prepared, tmp_path / "found")
    sides = {role: load_file(root / role / "model.safetensors") for role in ("aligned", "finetuned", "safety")}
    found = _values(tmp_path / "found")
    merged = {tensor.name for tensor in prepared.plan.tensors if tensor.action == "merge"}
    assert merged
    for name, tensor in found.items():
        expected = sides["finetuned"][name].double()
        if name in merged:
            expected = 0.8 * expected + 0.2 * sides["safety"][name].double()
        assert bool(((tensor.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-7).all())  # rounded once


def test_everything_is_told(executor: Executor, root: Path, tmp_path: Path) -> None:
    prepared = _prepared(root)
    told: list[Event] = []
    sealed = _run(executor, prepared, tmp_path / "out", told.append)
    slots = prepared.graph.layout.slots
    assert sum(e.nbytes for e in told if isinstance(e, BytesDone)) == sum(slot.nbytes for slot in slots.values())
    assert {e.name for e in told if isinstance(e, TensorDone)} == set(slots)
    assert {e.name: e.sha256 for e in told if isinstance(e, FileSealed)} == sealed.files
    header, entries = read_journal(tmp_path / "out" / JOURNAL_FILE)
    assert header is not None
    assert {name: key for name, (key, _) in entries.items()} == {t.slot.name: t.key for t in prepared.graph.tasks}


@pytest.mark.parametrize("after", [1, 9])
def test_an_interrupted_run_goes_on_and_only_the_rest_is_made(
    executor: Executor, root: Path, tmp_path: Path, after: int
) -> None:
    prepared = _prepared(root)
    left = [after]

    def interrupt(event: Event) -> None:
        if isinstance(event, TensorDone):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _run(executor, prepared, tmp_path / "out", interrupt)
    _, entries = read_journal(tmp_path / "out" / JOURNAL_FILE)
    assert len(entries) >= after
    told: list[Event] = []
    _run(executor, prepared, tmp_path / "out", told.append)
    assert {e.name for e in told if isinstance(e, TensorDone) and e.resumed} == set(entries)
    _run(LOCAL, prepared, tmp_path / "expected")
    assert _weights(tmp_path / "out") == _weights(tmp_path / "expected")


def test_each_goes_on_with_the_work_of_the_other(executor: Executor, root: Path, tmp_path: Path) -> None:
    prepared = _prepared(root)
    _run(LOCAL, prepared, tmp_path / "expected")
    for number, (first, second) in enumerate([(LOCAL, executor), (executor, LOCAL)]):
        folder = tmp_path / str(number)
        _run(first, prepared, folder)
        lines = (folder / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
        (folder / JOURNAL_FILE).write_bytes(b"".join(lines[:8]))
        damaged = next(task.slot for task in prepared.graph.tasks if task.slot.name.encode() in lines[3])
        with open(folder / prepared.graph.layout.files[damaged.shard], "r+b") as file:
            file.seek(damaged.offset)
            file.write(b"\1\2\3\4")
        told: list[Event] = []
        _run(second, prepared, folder, told.append)
        assert sum(isinstance(e, TensorDone) and e.resumed for e in told) == 6
        assert _weights(folder) == _weights(tmp_path / "expected")


@pytest.mark.parametrize("sources", [FULL, ADAPTERS], ids=["checkpoints", "adapters"])
def test_several_deltas_have_the_same_bytes_everywhere(
    executor: Executor, root: Path, tmp_path: Path, sources: str
) -> None:
    more = "others: {third: base, fourth: {adapter: safety-adapter}}"
    many = f"{sources[:-1]}, {more}}}"
    weights = "weights: {finetuned: 0.7, safety: 0.3, third: 0.4, fourth: -0.2}"
    prepared = _prepared(root, many, f"{{method: ties, density: 0.5, {weights}}}")
    alone = replace(prepared, resources=replace(prepared.resources, workers=1))
    _run(LOCAL, alone, tmp_path / "expected")
    _run(executor, prepared, tmp_path / "found")
    assert _weights(tmp_path / "found") == _weights(tmp_path / "expected")


def test_values_that_are_no_numbers_are_refused_with_their_place(
    executor: Executor, root: Path, tmp_path: Path
) -> None:
    make_family(tmp_path / "family", torch.bfloat16)
    file = tmp_path / "family" / "finetuned" / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        broken = {**tensors, name: tensors[name].clone()}
        broken[name].view(-1)[3] = float("nan")
        prepared = _prepared(tmp_path / "family")
        save_file(broken, file)
        with pytest.raises(SourceError, match=name):
            _run(executor, prepared, tmp_path / name)
        save_file(tensors, file)


def test_a_source_that_ends_early_is_refused(executor: Executor, root: Path, tmp_path: Path) -> None:
    make_family(tmp_path / "family", torch.bfloat16)
    prepared = _prepared(tmp_path / "family")
    file = tmp_path / "family" / "finetuned" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(SourceError, match="ends at byte"):
        _run(executor, prepared, tmp_path / "out")


def test_bytes_that_an_earlier_run_left_otherwise_are_not_sealed(
    executor: Executor, root: Path, tmp_path: Path
) -> None:
    prepared = _prepared(root)
    _run(LOCAL, prepared, tmp_path / "out")
    task = next(task for task in prepared.graph.tasks if task.work.copied is None)
    done: dict[str, str | None] = {task.slot.name: "0" * 32}
    journal = Journal(tmp_path / "out" / JOURNAL_FILE, {}, {})
    store = LocalStore(tmp_path / "out", prepared.graph.layout)
    with pytest.raises(WriteError, match=task.slot.name):
        executor.run(prepared.graph, store, prepared.resources, done, journal, ignore)
    journal.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with two matrices of 40 MB each in float32, which nobody should hold whole for all of its roles."""
    path = tmp_path_factory.mktemp("wide")
    draw = torch.Generator().manual_seed(0)
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "gate")]
    aligned = {name: tensor.bfloat16() for name, tensor in random_model(2).items()}
    aligned |= {name: torch.randn(2048, 4864, generator=draw).bfloat16() for name in names}
    write_model(path / "aligned", aligned)
    for role in ("finetuned", "safety"):
        noise = {name: (0.1 * torch.randn(2048, 4864, generator=draw)).bfloat16() for name in names}
        write_model(path / role, {name: tensor + noise.get(name, 0) for name, tensor in aligned.items()})
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("merge", ["linear", "ties"])
def test_memory_stays_within_what_was_given(
    executor: Executor, root: Path, wide: Path, tmp_path: Path, merge: str
) -> None:
    _run(executor, _prepared(root, merge=MERGES[merge]), tmp_path / "warm")  # what is imported is not counted
    sources, shards = FULL.replace("base: base, ", ""), "output: {max_shard_size: 8MB}"
    text = recipe_text(sources, "{always: true}", MERGES[merge], shards)
    prepared = prepare_recipe(wide, text, memory=110_000_000, workers=2)
    with OwnMemory() as own:
        _run(executor, prepared, tmp_path / "out")
    projected = projected_peak(max(map(task_memory, prepared.graph.tasks)), prepared.resources.workers)
    assert 0 < own.grown <= projected <= 110_000_000 < 3 * 4 * 2048 * 4864


class Refusing:
    """An executor that must not be asked."""

    def run(self, *asked: Any) -> Sealed:
        """Fails."""
        raise AssertionError("asked to compute")


def test_planning_computes_nothing_and_reads_no_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def read_bytes(self: Reader, path: str, offset: int, view: memoryview) -> None:
        read.append(path)

    monkeypatch.setattr(Reader, "read_bytes", read_bytes)
    text = recipe_text(FULL.replace("base: base, ", ""), "{always: true}", MERGES["ties"], SHARDS)
    prepared = prepare_recipe(root, text)
    assert prepared.graph.bytes_read
    assert not read
    with pytest.raises(AssertionError, match="asked to compute"):
        carry_out(prepared, tmp_path / "out", Digests(prepared.identities), ignore, executor=Refusing())
    assert not read
    assert not list(tmp_path.glob("out*/*.safetensors*"))


def test_what_others_registered_is_looked_for_when_it_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from safemerge_recipes.engine import executors

    looked: list[str] = []

    def installed(group: str) -> list[EntryPoint]:
        looked.append(group)
        ours = EntryPoint("local", "os:remove", group)
        return [ours, EntryPoint("twice", "os:remove", group), EntryPoint("bad", "os:no", group)]

    monkeypatch.setattr(executors, "entry_points", installed)
    assert find("local") is LOCAL, "a name of ours is ours"
    assert not looked
    with pytest.raises(RecipeError, match=r"expected bad, local, ray, twice"):
        find("trice")
    with pytest.raises(RecipeError, match=r"os:no cannot be loaded"):
        find("bad")
    assert looked == ["safemerge.executors"] * 2
