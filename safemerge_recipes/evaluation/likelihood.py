"""How likely a model is to begin its answer with a refusal, without letting it answer.

For each prompt the probability that the answer begins with one of `tasks/openings.txt`, cut after a few tokens: the
sum over distinct beginnings, teacher-forced. No sampling and no reading of answers, so that a change shows long before
an answer changes. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.storage.files import text_of

if TYPE_CHECKING:
    import torch

TOKENS = 4
"""Tokens of each opening that count."""


def openings() -> tuple[str, ...]:
    """Refusals as models say them, written for this project."""
    lines = text_of(Path(__file__).parent / "tasks" / "openings.txt", 1 << 20, "any").splitlines()
    return tuple(line for line in lines if line)


def beginnings(tokenizer: Any, texts: Sequence[str], tokens: int = TOKENS) -> list[list[int]]:
    """The distinct token sequences that texts begin with, none of which begins another."""
    cut = {tuple(tokenizer(text, add_special_tokens=False).input_ids[:tokens]) for text in texts}
    return [list(one) for one in sorted(cut) if not any(one != other and one[: len(other)] == other for other in cut)]


def refusal_likelihoods(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str],
    *,
    special_tokens: bool,
    tell: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """The natural logarithm of the probability that an answer begins as a refusal, of every context.

    Args:
        model: A transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        contexts: Prompts as the model gets them, with the chat template if there is one.
        special_tokens: Whether the tokenizer adds its own, as it does where no template did.
        tell: Told how many contexts are done.
    """
    import torch

    device = next(model.parameters()).device
    wanted = beginnings(tokenizer, openings())
    found = []
    with torch.inference_mode():
        for done, context in enumerate(contexts, 1):
            ids = tokenizer(context, add_special_tokens=special_tokens, return_tensors="pt").input_ids.to(device)
            found.append(_log_probability(model, ids, wanted))
            tell(done)
    return found


def _log_probability(model: Any, ids: torch.Tensor, wanted: Sequence[Sequence[int]]) -> float:
    """log Σ P(beginning | ids), ids `(1, n)`, float32; the context is read once and kept."""
    import torch

    first = model(input_ids=ids, use_cache=True)
    start = torch.log_softmax(first.logits[0, -1].float(), dim=-1)
    longest = max(map(len, wanted))
    padded = torch.zeros(len(wanted), longest, dtype=torch.long, device=ids.device)
    real = torch.zeros(len(wanted), longest, dtype=torch.bool, device=ids.device)
    for row, one in enumerate(wanted):
        padded[row, : len(one)] = torch.tensor(one, device=ids.device)
        real[row, : len(one)] = True
    total = start[padded[:, 0]]
    if longest > 1:
        # What follows the end of a shorter beginning is read too, and not counted: nothing attends to what comes later.
        kept = first.past_key_values
        if hasattr(kept, "batch_repeat_interleave"):
            kept.batch_repeat_interleave(len(wanted))
            logits = model(input_ids=padded[:, :-1], past_key_values=kept, use_cache=True).logits
        else:  # a kind of memory that cannot be shared: the context is read for each
            whole = torch.cat([ids.expand(len(wanted), -1), padded[:, :-1]], dim=1)
            logits = model(input_ids=whole, use_cache=False).logits[:, ids.shape[1] :]
        steps = torch.log_softmax(logits.float(), dim=-1)
        chosen = steps.gather(2, padded[:, 1:, None])[:, :, 0]
        total = total + (chosen * real[:, 1:]).sum(dim=1)
    return float(torch.logsumexp(total, dim=0))
