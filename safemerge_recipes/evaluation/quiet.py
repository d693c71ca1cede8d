"""What lm-eval is kept from: the terminal, git, an inventory of the machine, and leaving a model in another mode."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def kept_mode(model: Any) -> Iterator[None]:
    """Put a loaded model back into training mode if it was in it; lm-eval switches it off."""
    was_training = getattr(model, "training", False)
    try:
        yield
    finally:
        if was_training:
            model.train()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep lm-eval from listing every package and device, which takes seconds, and from running git where it stands.

    What matters of them is in the settings.
    """
    from lm_eval import evaluator

    asked = {"add_env_info": lambda results: None, "get_git_commit_hash": lambda: None}
    before = {name: getattr(evaluator, name) for name in asked if hasattr(evaluator, name)}
    for name in before:
        setattr(evaluator, name, asked[name])
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(evaluator, name, own)


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads; None: as many as it uses now."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """Keep lm-eval's log, bars and printed remarks off the terminal; failures come as exceptions."""
    if progress:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
