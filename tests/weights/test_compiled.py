"""The compiled kernels give torch's bytes, on every kind of processor they are compiled for.

Guards `methods.compiled_tensor`.
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from safemerge_recipes.errors import SourceError
from safemerge_recipes.events import ignore
from safemerge_recipes.methods import on_compiled, on_torch
from safemerge_recipes.methods.dare import DareKernel as Dare
from safemerge_recipes.methods.kernel import Kernel
from safemerge_recipes.methods.slerp import SlerpKernel as Slerp
from safemerge_recipes.methods.ties import Consensus
from safemerge_recipes.methods.ties import TiesKernel as Ties
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.methods.work import Apply, Sum
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.cut import PIECE
from safemerge_recipes.storage.layout import Slot
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import read_header
from safemerge_recipes.storage.workers import Resources
from safemerge_recipes.verification.verify import verify
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight
from safemerge_recipes.weights.draw import Draw
from safemerge_recipes.weights.numpy_rows import NumpyRows
from tests.fixtures.plain_family import ADAPTERS, FULL, make_family, recipe_text, run_recipe

pytestmark = pytest.mark.skipif(compiled.LIBRARY is None, reason="the kernels were not compiled")

PLAIN = compiled.load("_merge")
LIBRARIES = {"plain": PLAIN, "best": compiled.LIBRARY}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EVEN = Consensus((0.5, 0.5), True, 1.0)
KERNELS: dict[str, Kernel] = {
    "slerp": Slerp(0.3),
    "ties": Ties(0.3, Consensus((0.8, 0.2), True, 0.9)),
    "ties, plain sum": Ties(0.7, Consensus((0.6, 0.4), False, 1.0)),
    "ties, one side": Ties(0.5, Consensus((1.0, 0.0), True, 1.3)),
    "ties, all": Ties(1.0, EVEN),
    "ties, none": Ties(0.0, EVEN),
    "dare": Dare(Draw(0.4, 1), False, (0.7, 0.3), None),
    "dare, l1": Dare(Draw(0.4, 2), True, (0.7, 0.3), None),
    "dare, ties": Dare(Draw(0.5, 3), True, (0.7, 0.3), EVEN),
    "dare, all": Dare(Draw(1.0, 3), False, (0.7, 0.3), EVEN),
}
SHARES = (0.5, -0.3, 0.25, 0.8, 0.1)
MANY: dict[str, Callable[[int], Kernel]] = {
    "ties": lambda n: Ties(0.3, Consensus(SHARES[:n], True, 0.9)),
    "ties, plain sum": lambda n: Ties(0.7, Consensus(SHARES[:n], False, 1.0)),
    "dare": lambda n: Dare(Draw(0.4, 1), False, SHARES[:n], None),
    "dare, l1": lambda n: Dare(Draw(0.4, 2), True, SHARES[:n], None),
    "dare, ties": lambda n: Dare(Draw(0.5, 3), True, SHARES[:n], Consensus(SHARES[:n], True, 1.0)),
}
"""Kernels of any number of sides; two with a negative weight go the general way, too."""


def _store(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Weight]:
    save_file(tensors, folder / "x.safetensors")
    return {name: Weight.of(Stored(ref)) for name, ref in read_header(folder / "x.safetensors").items()}


def _normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 0.02) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _models(folder: Path, shape: tuple[int, ...], dtypes: dict[str, str]) -> dict[str, Weight]:
    """Aligned, fine-tuned and safety, which differ by updates with many equal magnitudes."""
    near = _normal(shape, torch.float32, 0)
    return _store(
        folder,
        {
            role: (near + seed * _normal(shape, torch.float32, seed, 1e-3)).to(DTYPES[dtype])
            for seed, (role, dtype) in enumerate(dtypes.items())
        },
    )


def _bytes(rounded: Callable[..., Any], work: Any, dtype: str, shape: tuple[int, ...], allow: bool = False) -> bytes:
    slot = Slot("w", dtype, shape, 0, 0, 0)
    with Reader() as reader:
        return b"".join(map(bytes, rounded(work, slot, Tools(reader, Arena(), 0), threading.Event(), allow)))


def _merged(work: Any, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes, which must be the same from every library."""
    assert on_compiled.fits(work, dtype)
    found = []
    for library in LIBRARIES.values():
        monkeypatch.setattr(compiled, "LIBRARY", library)
        found.append(_bytes(on_compiled.rounded, work, dtype, shape))
    assert found[0] == found[1]
    return found[0]


SIZES = [(1,), (3, 5), (1023,), (64, 1025), (3, PIECE // 2 + 7)]


@pytest.mark.parametrize("method", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_methods_give_the_bytes_of_torch(
    method: str, dtype: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = _models(tmp_path, shape, {"aligned": dtype, "finetuned": dtype, "safety": "BF16"})
    a, f, s = w["aligned"], w["finetuned"], w["safety"]
    for work in (Apply(a, (f - a, s - a), KERNELS[method]), Apply(Weight(), (f, s), KERNELS[method])):
        expected = _bytes(on_torch.rounded, work, dtype, shape)
        assert _merged(work, dtype, shape, monkeypatch) == expected


@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize("sides", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(3, 5), (64, 1025), (3, PIECE // 2 + 7)])
def test_any_number_of_sides_gives_the_bytes_of_torch(
    method: str, sides: int, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = _models(tmp_path, shape, {"aligned": "BF16", **{f"side {n}": ("BF16", "F16")[n % 2] for n in range(sides)}})
    a = w["aligned"]
    deltas = tuple(w[f"side {n}"] - a for n in range(sides))
    work = Apply(a, deltas, MANY[method](sides))
    assert _merged(work, "BF16", shape, monkeypatch) == _bytes(on_torch.rounded, work, "BF16", shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_sums_give_the_bytes_of_torch(
    stored: str, dtype: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = _models(tmp_path, shape, {"aligned": stored, "finetuned": "F32", "safety": stored})
    a, f, s = w["aligned"], w["finetuned"], w["safety"]
    for weight in (0.7 * f + 0.3 * s, 1.0 * a + 1.0 * f + -1.0 * s, 0.3 * s, a, a + 0.4 * (f - s), Weight()):
        work = Sum(weight)
        assert _merged(work, dtype, shape, monkeypatch) == _bytes(on_torch.rounded, work, dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [1, 700, 1 << 18])
def test_differences_for_the_gate_are_those_of_float64_rounded_once(
    dtype: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = _models(tmp_path, (37, 129), {"aligned": dtype, "base": "BF16"})
    stored = {name: load_file(tmp_path / "x.safetensors")[name].double() for name in ("aligned", "base")}
    wanted = (stored["aligned"] - stored["base"]).float().numpy()
    for library in (*LIBRARIES.values(), None):
        monkeypatch.setattr(compiled, "LIBRARY", library)
        with Reader() as reader:
            found = [part.copy() for _, part in NumpyRows(w["aligned"] - w["base"], reader, Arena(), piece)]
        assert np.array_equal(np.concatenate(found), wanted)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_stored_number_is_read_as_torch_reads_it(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    finite = every[every.isfinite()]
    w = _store(tmp_path, {"x": finite})
    found = _merged(Sum(w["x"]), "F32", tuple(finite.shape), monkeypatch)
    assert found == finite.float().numpy().tobytes()


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(0, 2**32 - 1).map(
    lambda bits: float(np.uint32(bits).view(np.float32))
)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(NUMBERS.filter(math.isfinite), min_size=1, max_size=40), dtype=st.sampled_from(["F16", "BF16"]))
def test_numbers_are_rounded_as_torch_rounds_them(
    values: list[float], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    work = Sum(_store(tmp_path_factory.mktemp("x"), {"x": x})["x"])
    found = _bytes(on_compiled.rounded, work, dtype, tuple(x.shape), allow=True)
    assert found == x.to(DTYPES[dtype]).view(torch.int16).numpy().tobytes()


def test_halves_between_two_numbers_are_rounded_to_even(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every middle between neighbouring float16 numbers, subnormals too, and what lies just beside it."""
    every = torch.arange(0x7BFF, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    following = torch.arange(1, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middle = (every + following) / 2  # exact in float32
    up, down = (torch.nextafter(middle, torch.tensor(end)) for end in (math.inf, -math.inf))
    x = torch.cat([middle, up, down, -middle])
    found = _merged(Sum(_store(tmp_path, {"x": x})["x"]), "F16", tuple(x.shape), monkeypatch)
    assert found == x.half().view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (9, 100), (130, 257), (3, PIECE // 2 + 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_torch_and_exact_to_rounding(
    shape: tuple[int, int], transposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, (rows, columns) = 7, shape
    factors = {"b": (columns, rank) if transposed else (rows, rank), "a": (rank, rows if transposed else columns)}
    tensors = {name: _normal(size, torch.bfloat16, 5, 1.0) for name, size in factors.items()}
    tensors["w"] = _normal(shape, torch.bfloat16, 6)
    w = _store(tmp_path, tensors)
    b, a = (w[name].stored for name in ("b", "a"))
    assert b is not None
    assert a is not None
    update = Weight.of(LowRank(b, a, 1.5, transposed))
    product = tensors["b"].double() @ tensors["a"].double()
    dense = 1.5 * (product.T if transposed else product)
    found = np.frombuffer(_merged(Sum(w["w"] + 0.5 * update), "F32", shape, monkeypatch), np.float32)
    wanted = tensors["w"].double() + 0.5 * dense
    torch.testing.assert_close(torch.tensor(found).double().view(shape), wanted, rtol=1e-5, atol=1e-5)
    assert found.tobytes() == _bytes(on_torch.rounded, Sum(w["w"] + 0.5 * update), "F32", shape)
    # Inside a method, and added to its result.
    work = Apply(w["w"], (update, -1.0 * update + w["w"]), KERNELS["slerp"])
    for dtype in ("F32", "BF16"):
        assert _merged(work, dtype, shape, monkeypatch) == _bytes(on_torch.rounded, work, dtype, shape)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["slerp", "ties", "ties, plain sum", "dare", "dare, l1", "dare, ties"])
@pytest.mark.parametrize("place", ["finetuned", "safety"])
def test_what_is_not_finite_is_refused_wherever_it_is(value: float, method: str, place: str, tmp_path: Path) -> None:
    n = 3000
    tensors = {role: _normal((n,), torch.float32, seed) for seed, role in enumerate(("finetuned", "safety"))}
    tensors[place][1234:] = value  # more than any method drops
    w = _store(tmp_path, tensors)
    work = Apply(Weight(), (w["finetuned"], w["safety"]), KERNELS[method])
    for rounded in (on_compiled.rounded, on_torch.rounded):
        with pytest.raises(SourceError, match="NaN or infinite"):
            _bytes(rounded, work, "BF16", (n,), allow=True)


@pytest.mark.parametrize("method", ["slerp", "ties", "ties, plain sum", "dare", "dare, l1", "dare, ties"])
@pytest.mark.parametrize("place", ["finetuned", "safety"])
def test_one_number_that_is_none_is_refused_whatever_the_other_side_holds(
    method: str, place: str, tmp_path: Path
) -> None:
    """Also where the other side's number is 0, or dropped, or trimmed: no choice between the two may hide it."""
    n = 400
    for number in range(12):
        tensors = {role: _normal((n,), torch.float32, seed) for seed, role in enumerate(("finetuned", "safety"))}
        tensors["safety" if place == "finetuned" else "finetuned"][::4] = 0
        tensors[place][number] = math.copysign(math.nan, -1 if number % 2 else 1)  # processors make both
        w = _store(tmp_path, tensors)
        work = Apply(Weight(), (w["finetuned"], w["safety"]), KERNELS[method])
        for rounded in (on_compiled.rounded, on_torch.rounded):
            with pytest.raises(SourceError, match="NaN or infinite"):
                _bytes(rounded, work, "BF16", (n,), allow=True)


def test_one_bad_number_is_enough(tmp_path: Path) -> None:
    for place in (0, 1023, 1024, 2999):
        x = _normal((3000,), torch.bfloat16, 0)
        x[place] = math.inf
        with pytest.raises(SourceError, match=r"w: 1 merged values are NaN or infinite; expected .*x\.safetensors"):
            _bytes(on_compiled.rounded, Sum(_store(tmp_path, {"x": x})["x"]), "F32", (3000,))


def test_values_that_do_not_fit_are_refused_or_allowed(tmp_path: Path) -> None:
    w = _store(tmp_path, {"x": torch.tensor([1.0, 65520.0, 70000.0, -1e9, 65519.0])})
    with pytest.raises(SourceError, match="3 merged values do not fit F16"):
        _bytes(on_compiled.rounded, Sum(w["x"]), "F16", (5,))
    found = np.frombuffer(_bytes(on_compiled.rounded, Sum(w["x"]), "F16", (5,), allow=True), np.float16)
    assert found.tolist() == [1.0, math.inf, math.inf, -math.inf, 65504.0]


def test_what_needs_float64_or_is_not_compiled_goes_to_torch(tmp_path: Path) -> None:
    w = _store(tmp_path, {"x": torch.ones(3), "wide": torch.ones(3, dtype=torch.float64)})
    assert on_compiled.fits(Sum(w["x"]), "F32")
    assert not on_compiled.fits(Sum(w["wide"]), "F32")
    assert not on_compiled.fits(Sum(w["x"]), "F64")

    class Mean(Kernel):
        def apply(self, state: Any, start: int, x: torch.Tensor, arena: Arena) -> torch.Tensor:
            return x

    assert not on_compiled.fits(Apply(Weight(), (w["x"],), Mean()), "F32")


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.load("_merge") is not None
    monkeypatch.setattr(compiled, "VERSION", compiled.VERSION + 1)
    assert compiled.load("_merge") is None
    assert compiled.load("_no_such_library") is None


def test_structures_are_laid_out_as_in_c() -> None:
    """The sizes that the compiler sees, by way of a field behind all others."""
    assert compiled.LIBRARY is not None
    merge = compiled.Merge()
    sides = (compiled.Sum * 3)()
    merge.sides, merge.count = sides, 3
    sides[2].rank, sides[2].columns = 2, 11
    compiled.LIBRARY.sm_strip.restype = ctypes.c_int64
    assert compiled.LIBRARY.sm_strip(ctypes.byref(merge)) == compiled.strip(11)
    sides[2].rank = 0
    assert compiled.LIBRARY.sm_strip(ctypes.byref(merge)) == compiled.strip(None)
    for columns in (1, 5, 4096, 8192, 8193, 100_000):
        merge.origin.rank, merge.origin.columns = 1, columns
        assert compiled.LIBRARY.sm_strip(ctypes.byref(merge)) == compiled.strip(columns)
        assert compiled.strip(columns) % (compiled.ROWS * columns) == 0
    assert compiled.LIBRARY.sm_size() == ctypes.sizeof(compiled.Merge) + ctypes.sizeof(compiled.Coded)


def test_a_merge_that_is_all_compiled_does_not_load_torch(
    llama: Any, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    sources: dict[str, Any] = {role: llama / role for role in ("base", "aligned")}
    sources |= {role: {"adapter": str(llama / f"{role}-lora")} for role in ("finetuned", "safety")}
    code = (
        "import sys; from safemerge_recipes.cli.program import guarded\n"
        "from safemerge_recipes.cli.app import run_app as app\n"
        "for path in sys.argv[1:]:\n"
        "    code = guarded(lambda: app([path], standalone_mode=False))\n"
        "    print(path, code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    methods = ("linear", "slerp", "ties", "dare_ties")
    paths = [
        recipe(f"{method}.yaml", sources=sources, gate={"tau": 0.5}, merge={"method": method}, output={"path": method})
        for method in methods
    ]
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for method, path in zip(methods, paths, strict=True):
        assert f"{path} 0 []" in done.stdout.splitlines(), done.stderr
        plan = json.loads((tmp_path / method / "safemerge_plan.json").read_text())
        assert plan["summary"]["merged"]


def test_a_machine_without_the_library_merges_alike(
    llama: Any, call: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("linear", "ties"):
        path = recipe(
            sources={role: llama / role for role in ("base", "aligned", "finetuned", "safety")},
            gate={"fraction": 0.5}, merge={"method": method},
        )  # fmt: skip
        found = []
        for library in (compiled.LIBRARY, None):
            monkeypatch.setattr(compiled, "LIBRARY", library)
            output = tmp_path / f"{method}-{library is None}"
            assert call("run", path, "--output", output).code == 0
            found.append((output / "model.safetensors").read_bytes())
            manifest = json.loads((output / "safemerge_manifest.json").read_text())
            assert manifest["versions"]["native"] == ("not built" if library is None else str(compiled.VERSION))
        assert found[0] == found[1]
        monkeypatch.undo()


def test_ties_are_kept_by_position_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant tensor: what is kept of it is its beginning, in a later piece and in the middle of a strip."""
    n = 2 * PIECE + 5000
    w = _store(tmp_path, {"x": torch.full((n,), 0.25), "y": torch.zeros(n)})
    keep = PIECE + 1500
    kernel = Ties(keep / n, Consensus((1.0, 0.0), False, 1.0))
    work = Apply(Weight(), (w["x"], w["y"]), kernel)
    found = np.frombuffer(_merged(work, "F32", (n,), monkeypatch), np.float32)
    kept = kernel.kept(n)[0]
    assert abs(kept - keep) <= 1
    assert (found[:kept] == 0.25).all()
    assert not found[kept:].any()


WHOLE = {
    "q": "{method: linear, alpha: 0.7}",
    "k": "{method: task_arithmetic, lambda_finetuned: 0.9, lambda_safety: 0.3}",
    "v": "{method: slerp, alpha: 0.6}",
    "o": "{method: ties, density: 0.4}",
    "gate": "{method: dare_linear, density: 0.5, seed: 3}",
    "up": "{method: dare_ties, density: 0.5, rescale: l1}",
}
"""The merge of each kind of matrix: all methods that are compiled, in one output."""


@pytest.mark.parametrize("sources", [ADAPTERS, FULL], ids=["adapters", "checkpoints"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_verifies_where_nothing_was_compiled(
    sources: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path, dtype)
    rules = "".join(f"  - {{tensors: '*.{kind}_proj.*', merge: {merge}}}\n" for kind, merge in WHOLE.items())
    text = recipe_text(sources, "{always: true}", "{method: linear}", f"rules:\n{rules}")
    prepared, written = run_recipe(tmp_path, text)
    native = {task.slot.name for task in prepared.graph.tasks if task.native}
    assert all(any(f".{kind}_proj." in name for name in native) for kind in WHOLE)
    monkeypatch.setattr(compiled, "LIBRARY", None)
    again, by_torch = run_recipe(tmp_path, text)
    assert not any(task.native for task in again.graph.tasks)
    assert [task.key for task in again.graph.tasks] == [task.key for task in prepared.graph.tasks]
    assert all(torch.equal(written[name], tensor) for name, tensor in by_torch.items())
    result = verify(tmp_path / "out0", Resources(2, 1 << 30, "cpu"), ignore, deep=True)
    assert result["recomputed"] == len(written)
