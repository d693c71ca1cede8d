"""The rarer operands, read from a file range by range, against their definitions written out densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.storage.safetensors import TensorRef, read_header
from safemerge_recipes.weights.algebra import LowRank, Stored, Weight
from safemerge_recipes.weights.operands import Fused, LowRankStack, Rescaled, Rows, Transposed, member, transposed
from safemerge_recipes.weights.torch_factors import working_dtype
from safemerge_recipes.weights.torch_operands import OPENED
from safemerge_recipes.weights.torch_rows import Evaluator

torch.manual_seed(0)
TENSORS = {
    "w": torch.randn(6, 4), "x": torch.randn(3, 4), "m": torch.rand(6) + 0.5, "n": torch.rand(4) + 0.5,
    "b": torch.randn(6, 2), "a": torch.randn(2, 4),
    "stack.b": torch.randn(5, 2 * 3), "stack.a": torch.randn(3 * 2, 4), "fused": torch.randn(3, 5, 4),
    "wide": torch.randn(6, 4, dtype=torch.float64),
}  # fmt: skip


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorRef]:
    file = tmp_path_factory.mktemp("operands") / "tensors.safetensors"
    save_file(TENSORS, file)
    return read_header(Path(file))


@pytest.fixture
def evaluate() -> Iterator[Callable[..., torch.Tensor]]:
    """`evaluate(weight, rows)`: the weight put together from pieces of so many rows."""
    with Reader() as reader:

        def run(weight: Weight, rows: int) -> torch.Tensor:
            dtype = working_dtype(weight)
            evaluator = Evaluator((weight,), reader, Arena(), "test", dtype)
            total, columns = torch.Size(weight.shape).numel(), weight.shape[-1]
            starts = range(0, total, rows * columns)
            pieces = [evaluator(start, min(start + rows * columns, total))[0].clone() for start in starts]
            return torch.cat(pieces).reshape(weight.shape)

        yield run


def expert(number: int) -> torch.Tensor:
    """B_e·A_e as PEFT lays the factors out: A one expert after the other, B interleaved."""
    a = TENSORS["stack.a"].reshape(3, 2, 4)[number]
    return TENSORS["stack.b"].reshape(5, 2, 3)[:, :, number] @ a


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_operands_are_what_they_are_defined_to_be(
    refs: dict[str, TensorRef], evaluate: Callable[..., torch.Tensor], rows: int
) -> None:
    w, product = Weight.of(Stored(refs["w"])), Weight.of(LowRank(refs["b"], refs["a"], 0.5))
    dense = TENSORS["w"] + 0.5 * TENSORS["b"] @ TENSORS["a"]
    stack = torch.stack([2.0 * expert(number) for number in range(3)])
    m, n = TENSORS["m"], TENSORS["n"]
    cases = {
        "sum": (w + product, dense),
        "stack": (Weight.of(LowRankStack(refs["stack.b"], refs["stack.a"], 2.0, 3)), stack),
        "stack, input first": (
            Weight.of(LowRankStack(refs["stack.b"], refs["stack.a"], 2.0, 3, transposed=True)), stack.transpose(1, 2),
        ),
        "DoRA by row": (
            Weight.of(Rescaled(w + product, refs["m"])), m[:, None] * dense / dense.norm(dim=1, keepdim=True),
        ),
        "DoRA by column": (
            Weight.of(Rescaled(w + product, refs["n"], columns=True)), n * dense / dense.norm(dim=0, keepdim=True),
        ),
        "rows": (
            Weight.of(Rows((w, Weight.of(Stored(refs["x"]))), ((0, 4, 2), (1, 0, 3), (0, 0, 1)))),
            torch.cat([TENSORS["w"][4:], TENSORS["x"], TENSORS["w"][:1]]),
        ),
        "fused": (
            Weight.of(Fused((3, 3, 4), ((3, Weight.of(Stored(refs["x"]))), (6, w)))),
            torch.cat([TENSORS["x"], TENSORS["w"]]).reshape(3, 3, 4),
        ),
        "transposed": (Weight.of(Transposed(Rescaled(w, refs["m"]))), None),
    }  # fmt: skip
    cases["transposed"] = (
        cases["transposed"][0],
        (m[:, None] * TENSORS["w"] / TENSORS["w"].norm(dim=1, keepdim=True)).T.contiguous(),
    )
    used = {type(operand) for weight, _ in cases.values() for _, operand in weight}
    assert used >= set(OPENED), "an operand that this test does not know"
    for name, (weight, expected) in cases.items():
        assert weight.shape == tuple(expected.shape), name
        torch.testing.assert_close(evaluate(weight, rows), expected, msg=lambda text, name=name: f"{name}: {text}")


def test_members_and_transposes_are_weights_too(
    refs: dict[str, TensorRef], evaluate: Callable[..., torch.Tensor]
) -> None:
    stack = Weight.of(Stored(refs["fused"])) + Weight.of(LowRankStack(refs["stack.b"], refs["stack.a"], 2.0, 3))
    for number in range(3):
        torch.testing.assert_close(evaluate(member(stack, number), 2), TENSORS["fused"][number] + 2.0 * expert(number))
    turned = transposed(Weight.of(LowRank(refs["b"], refs["a"], 1.0)) + Weight.of(Stored(refs["w"])))
    torch.testing.assert_close(evaluate(turned, 2), (TENSORS["b"] @ TENSORS["a"] + TENSORS["w"]).T)
    assert transposed(turned) == Weight.of(LowRank(refs["b"], refs["a"], 1.0)) + Weight.of(Stored(refs["w"]))


def test_one_float64_tensor_makes_the_arithmetic_float64(
    refs: dict[str, TensorRef], evaluate: Callable[..., torch.Tensor]
) -> None:
    found = evaluate(Weight.of(Stored(refs["wide"])) - Weight.of(Stored(refs["w"])), 3)
    assert torch.equal(found, TENSORS["wide"] - TENSORS["w"].double())
