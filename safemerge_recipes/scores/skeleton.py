"""A role's model in transformers without its weights, which come and go block by block.

The module tree is built on the meta device; a block's parameters are computed from the role's symbolic weights, in
float32, when it is its turn. So adapters are exact, and no more than one block is ever in memory. Runs no code of a
model's repository.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import CheckError, PlanError, SourceError
from safemerge_recipes.evaluation.quiet import quiet
from safemerge_recipes.recipe.model import Role
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.side_files import copy_side_files, side_files
from safemerge_recipes.sources.vocabulary import is_head
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.cut import ranges
from safemerge_recipes.storage.reader import Reader
from safemerge_recipes.tensor_names import stack_of
from safemerge_recipes.weights.algebra import Weight
from safemerge_recipes.weights.torch_rows import Evaluator

if TYPE_CHECKING:
    import torch

Place = tuple[Any, str]
"""A module and the name of its parameter."""


def check_extra() -> None:
    """Raises PlanError where the libraries that run models are not installed."""
    import importlib.util

    missing = [name for name in ("torch", "transformers", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise PlanError(
            f"scores from activations need {', '.join(missing)}; try `pip install 'safemerge-recipes[eval]'`"
        )


def whole(weight: Weight, shape: tuple[int, ...], reader: Reader, device: str) -> torch.Tensor:
    """A weight in float32, on the device."""
    import torch

    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    evaluate = Evaluator((weight,), reader, Arena(device), "whole", torch.float32)
    for first, last in ranges(shape, True):
        out[first:last] = evaluate(first, last)[0]
    return out.view(shape)


class Skeleton:
    """The module tree of a role's model.

    Attributes:
        model: the module tree, in evaluation mode.
        tokenizer: the family's tokenizer.
        blocks: the modules of its stack of blocks, in order.
        places: tensor name -> the parameter that it is in transformers.
    """

    def __init__(self, family: Family, role: Role, scored: Sequence[str], reader: Reader, device: str) -> None:
        self.family, self.role, self.reader, self.device = family, role, reader, device
        self.model, self.tokenizer = _built(family)
        self._tie_head()
        self._names = dict(self.model.named_parameters(remove_duplicate=False))
        self.places: dict[str, Place] = {}
        for name, ref in family.inventory.items():
            own = self._own_name(name)
            if own is not None and tuple(self._names[own].shape[1:]) == ref.shape[1:]:
                owner, _, attribute = own.rpartition(".")
                self.places[name] = self.model.get_submodule(owner), attribute
        self.blocks = self._blocks(scored)
        self._stack = {id(module) for block in self.blocks for module in block.modules()}
        self._check_whole()

    def _tie_head(self) -> None:
        """Where the files hold no head, it is the embedding."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and not any(is_head(name) for name in self.family.inventory):
            head.weight = embedding.weight

    def _own_name(self, name: str) -> str | None:
        prefix = getattr(self.model, "base_model_prefix", "")
        known = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((one for one in known if one in self._names), None)

    def _blocks(self, scored: Sequence[str]) -> list[Any]:
        unknown = next((name for name in scored if name not in self.places), None)
        if unknown is not None:
            raise CheckError(
                f"{unknown}: transformers stores it otherwise than the files do, so its inputs cannot be seen; expected"
                " a gate.scope without it, or --by magnitude or drift"
            )
        stacks = sorted({stack_of(name) or "" for name in scored})
        if len(stacks) != 1 or not stacks[0]:
            raise CheckError(f"the gated tensors lie in {', '.join(stacks)[:200]}; expected one stack of blocks")
        first = self._own_name(scored[0]) or scored[0]
        return list(self.model.get_submodule(stack_of(first) or ""))

    def _check_whole(self) -> None:
        """Every parameter must have its weight: under its own name, or that of one it is tied to."""
        covered = {id(module._parameters[attribute]) for module, attribute in self.places.values()}
        lacking = next((name for name, value in self._names.items() if id(value) not in covered), None)
        if lacking is not None:
            raise CheckError(
                f"sources.{self.role}: transformers expects {lacking}, which the files hold otherwise or not at all; "
                "expected a model whose tensors have their names, or --by magnitude or drift"
            )

    def inside(self, block: Any) -> list[str]:
        """The tensors of a block."""
        modules = {id(module) for module in block.modules()}
        return [name for name, (module, _) in self.places.items() if id(module) in modules]

    def outside(self) -> list[str]:
        """The tensors outside the blocks: embeddings, final norm, head."""
        return [name for name, (module, _) in self.places.items() if id(module) not in self._stack]

    def fill(self, names: Sequence[str], wanted: Callable[[str], bool] = lambda name: False) -> None:
        """Puts weights in their places; those that are `wanted` get gradients."""
        import torch

        tied: dict[int, list[Place]] = {}
        for own, value in self._names.items():
            owner, _, attribute = own.rpartition(".")
            tied.setdefault(id(value), []).append((self.model.get_submodule(owner), attribute))
        given = {(id(module), attribute) for module, attribute in (self.places[name] for name in names)}
        for name in names:
            module, attribute = self.places[name]
            values = whole(
                self.family.weight(self.role, name), self.family.inventory[name].shape, self.reader, self.device
            )
            if not bool(values.isfinite().all()):
                raise SourceError(
                    f"sources.{self.role}: {name} holds values that are not finite; expected a sound model"
                )
            parameter = torch.nn.Parameter(values, requires_grad=wanted(name))
            before = self._names[self._own_name(name) or name]
            module._parameters[attribute] = parameter
            for other, where in tied.get(id(before), ()):
                if (id(other), where) not in given:
                    other._parameters[where] = parameter

    def empty(self, names: Sequence[str]) -> None:
        """Takes weights out of their places again."""
        for name in names:
            module, attribute = self.places[name]
            module._parameters[attribute] = self._names[self._own_name(name) or name]

    @contextlib.contextmanager
    def standing_in(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        """The model with `stand_in(number of the block, *arguments)` in the place of every block's computation."""
        for number, block in enumerate(self.blocks):
            block.forward = lambda *given, _number=number, **named: stand_in(_number, *given, **named)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _built(family: Family) -> tuple[Any, Any]:
    """The module tree with parameters on the meta device, and the tokenizer."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="safemerge-") as scratch:
        copy_side_files(side_files(family), Path(scratch), family.config_edits)
        try:
            with quiet(False):
                config = AutoConfig.from_pretrained(scratch)
                tokenizer = AutoTokenizer.from_pretrained(scratch)
                with init_empty_weights(include_buffers=False):
                    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckError(
                f"sources.{family.owner}: transformers cannot run it ({type(error).__name__}: {first}); expected a "
                "model and tokenizer that it loads without code of their own"
            ) from None
    return model.eval(), tokenizer
