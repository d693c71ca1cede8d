"""Prompts through a model one block at a time: forwards, and backwards with the gradients of each block's weights.

A first pass in which every block stands aside records what the model hands to each of them besides the hidden states
(masks, positions). Then one block after the other is loaded and sees all prompts. Prompts go one by one, unpadded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from safemerge_recipes.errors import CheckError
from safemerge_recipes.scores.prompts import Example
from safemerge_recipes.scores.skeleton import Skeleton
from safemerge_recipes.scores.tape import Tape

if TYPE_CHECKING:
    import torch

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given besides the hidden states."""
BlockDone = Callable[[int], None]


class _StopError(Exception):
    """The blocks have been passed."""


class Passes:
    """The passes of some prompts through a model.

    Args:
        skeleton: the model.
        examples: the prompts.
        levels: whether the states before every block are kept, as going backwards needs them.
    """

    def __init__(self, skeleton: Skeleton, examples: Sequence[Example], levels: bool) -> None:
        self.skeleton, self.examples, self.levels = skeleton, examples, levels
        self.tape = Tape([len(one.ids) for one in examples], skeleton.device)
        self._given: list[list[Given]] = []
        self._wrapped = False

    def _ids(self, number: int) -> torch.Tensor:
        import torch

        return torch.tensor([self.examples[number].ids], device=self.skeleton.device)

    def begin(self) -> None:
        """Embeds every prompt and records what each block is given.

        Raises:
            CheckError: the model does not hand hidden states from block to block.
        """
        import torch

        last = len(self.skeleton.blocks) - 1
        for number in range(len(self.examples)):
            given: dict[int, Given] = {}

            def stand_in(
                place: int, *arguments: Any, _number: int = number, _given: dict[int, Given] = given, **named: Any
            ) -> Any:
                states = arguments[0] if arguments else named.pop("hidden_states")
                _given[place] = arguments[1:], named
                if place == 0:
                    self.tape.write(0, _number, states)
                if place == last:
                    if states.dim() != 3 or states.shape[1] != len(self.examples[_number].ids):
                        raise IndexError
                    raise _StopError
                return (states,) if self._wrapped else states

            with torch.no_grad(), self.skeleton.standing_in(stand_in):
                for wrapped in (self._wrapped, not self._wrapped):
                    self._wrapped = wrapped
                    try:
                        self.skeleton.model(input_ids=self._ids(number), use_cache=False)
                    except _StopError:
                        break
                    except (IndexError, AttributeError, TypeError, RuntimeError, ValueError) as error:
                        failed = error
                else:
                    raise CheckError(
                        f"sources.{self.skeleton.role}: its blocks do not hand on hidden states as decoders do "
                        f"({type(failed).__name__}); expected a decoder, or --by magnitude or drift"
                    )
            self._given.append([given[place] for place in range(last + 1)])

    def _through(self, place: int, number: int, states: torch.Tensor) -> torch.Tensor:
        arguments, named = self._given[number][place]
        out = self.skeleton.blocks[place](states, *arguments, **named)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def forward(self, place: int) -> None:
        """All prompts through one block, whose weights are there."""
        import torch

        for number in range(len(self.examples)):
            level = place if self.levels else 0
            with torch.no_grad():
                out = self._through(place, number, self.tape.read(level, number))
            self.tape.write(level + 1 if self.levels else 0, number, out)

    def end(self) -> None:
        """The loss of every prompt, and its gradient in the place of the last states.

        Raises:
            CheckError: a loss is not finite.
        """
        import torch

        last = len(self.skeleton.blocks)
        for number, example in enumerate(self.examples):
            states = self.tape.read(last, number).requires_grad_()

            def stand_in(place: int, *arguments: Any, _states: torch.Tensor = states, **named: Any) -> Any:
                return (_states,) if self._wrapped else _states

            with self.skeleton.standing_in(stand_in):
                logits = self.skeleton.model(input_ids=self._ids(number), use_cache=False).logits[0]
            first = max(example.first, 1)
            wanted = torch.tensor(example.ids[first:], device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits[first - 1 : -1].float(), wanted)
            if not bool(loss.isfinite()):
                raise CheckError(
                    f"{example.where}: its loss is {float(loss)}; expected finite numbers, check the prompt"
                )
            loss.backward()
            assert states.grad is not None
            self.tape.write(last, number, states.grad)

    def backward(self, place: int, each: Callable[[int], None]) -> None:
        """Gradients of one block's weights for each prompt in turn; `each` takes them before they are forgotten."""
        for number in range(len(self.examples)):
            states = self.tape.read(place, number).requires_grad_()
            out = self._through(place, number, states)
            out.backward(self.tape.read(place + 1, number))
            each(number)
            assert states.grad is not None
            self.tape.write(place, number, states.grad)

    def close(self) -> None:
        """Forgets the states."""
        self.tape.close()
