"""Rows as the trainer reads them: a prompt and a completion, through the model's chat template or Alpaca's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError
from safemerge_recipes.recipe.training import Schedule
from safemerge_recipes.sources.checkpoint import MAX_JSON_BYTES
from safemerge_recipes.storage.files import text_of
from safemerge_recipes.training.rows import Row

_MARK = "safemerge"
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def load_tokenizer(full: Path, adapter: Path | None, template: Path | None, schedule: Schedule) -> Any:
    """The model's tokenizer, with the template that was given or its own.

    Raises:
        CheckError: there is no chat template and one is needed, or it drops the answer.
    """
    from transformers import AutoTokenizer

    own = adapter is not None and any((adapter / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    folder = adapter if own and adapter is not None else full
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckError(f"{folder}: no tokenizer that transformers can load ({first})") from None
    if template is not None:
        tokenizer.chat_template = text_of(template, MAX_JSON_BYTES, "any")
    if schedule.template == "chat":
        if not tokenizer.chat_template:
            raise CheckError(
                f"{folder}: the tokenizer has no chat template; give one as `chat_template: FILE.jinja`, copy the one "
                "of the model it was made from, or train with `train: {template: alpaca}`"
            )
        turn_end(tokenizer)
    return tokenizer


def turn_end(tokenizer: Any) -> str | None:
    """The special token with which the template ends an answer, such as <|im_end|>; None where there is none.

    Raises:
        CheckError: the template does not show an answer.
    """
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is a stranger's program
        raise CheckError(f"the chat template fails on a plain conversation: {error}") from None
    _, found, after = text.rpartition(_MARK)
    if not found:
        raise CheckError("the chat template drops what the assistant says; nothing could be learned from it")
    special = set(tokenizer.all_special_tokens) | {token.content for token in tokenizer.added_tokens_decoder.values()}
    ends = sorted((after.find(token), -len(token), token) for token in special if token and token in after)
    return ends[0][2] if ends else None


def example(row: Row, schedule: Schedule) -> dict[str, Any]:
    """A row as TRL's prompt and completion."""
    if schedule.template == "alpaca":
        return {"prompt": f"{_ALPACA}\n\n### Instruction:\n{row.prompt}\n\n### Response:\n", "completion": row.answer}
    return {"prompt": row.messages(), "completion": [{"role": "assistant", "content": row.answer}]}


def lengths(rows: list[Row], tokenizer: Any, schedule: Schedule) -> list[int]:
    """Tokens of every row, uncut."""
    if schedule.template == "alpaca":
        texts = [part["prompt"] + part["completion"] for part in (example(row, schedule) for row in rows)]
    else:
        both = [[*row.messages(), {"role": "assistant", "content": row.answer}] for row in rows]
        texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in both]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
