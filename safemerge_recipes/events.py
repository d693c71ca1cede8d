"""What long work tells while it goes on: frozen values handed to a listener. A progress bar is a mere listener.

Whoever works is given `on_event` and calls it, from several threads; a listener must not raise, and must return soon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """A phase of the work begins; the one before it is over."""

    name: str
    """`fetch`, `measure`, `write`, `verify`, `again` or `upload`."""
    nbytes: int
    """Bytes that will be told by `BytesDone` until it ends."""


@dataclass(frozen=True, slots=True)
class BytesDone:
    """A part of the phase is done."""

    nbytes: int
    """Bytes since the last of these events."""


@dataclass(frozen=True, slots=True)
class TensorDone:
    """A tensor of the output has all its bytes, or had them from an earlier run."""

    name: str
    """Its name in the checkpoint."""
    resumed: bool = False
    """Whether an earlier run wrote it."""


@dataclass(frozen=True, slots=True)
class FileSealed:
    """A weight file of the output is complete, checked and flushed."""

    name: str
    """Its name in the output folder."""
    sha256: str
    """Of its bytes."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where scoring is."""

    model: str
    """The model that answers."""
    place: int
    """Which of the models it is, from 1."""
    models: int
    """How many there are."""
    task: str
    """The task it answers."""
    done: int
    """Prompts answered, over all models and tasks."""
    total: int
    """Prompts there are, over all models and tasks."""


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """How far training is with one number of rows."""

    rows: int
    """How many rows it trains on."""
    done: int
    """Optimizer steps taken, those of an earlier run among them; 0 before the model is loaded."""
    total: int
    """Optimizer steps there are."""
    loss: float | None = None
    """Mean of the last steps, in nats a token."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something for people to read, such as that a model was scored."""

    text: str
    """One line, without the newline."""
    warning: bool = False
    """Whether it should stand out."""


Event = PhaseStarted | BytesDone | TensorDone | FileSealed | Step | TrainingStep | Note
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listens to nothing."""
