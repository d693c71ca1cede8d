"""The evaluation of a recipe: how the result is scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.fields import Seed, Strict, Text, as_tuple


class Judge(Strict):
    """Another model's verdict on the answers to harmful requests."""

    kind: Literal["llama-guard-3", "chat", "openai"]
    """`llama-guard-3`: that model, loaded here or behind `url`; `chat`: a model loaded here; `openai`: a server."""
    model: Text
    """The judge's folder or hub id, or its name at the server."""
    prompt: Text | None = None
    """How it is asked: `verdict`, `llama-guard-3`, `harmbench`, `strongreject`, or a file with `{request}` and
    `{answer}`; null: what goes with the kind."""
    url: Text | None = None
    """Base address of an OpenAI-compatible server, such as `http://localhost:8000/v1`; its key is read from
    OPENAI_API_KEY."""

    @model_validator(mode="after")
    def _check(self) -> Judge:
        if self.kind == "openai" and self.url is None:
            raise ValueError("url is missing; expected the server's address, such as http://localhost:8000/v1")
        if self.kind == "chat" and self.url is not None:
            raise ValueError("url goes with kind openai or llama-guard-3")
        return self


class Evaluate(Strict):
    """How the result is scored, with lm-eval."""

    tasks: Annotated[tuple[Text, ...], Field(strict=False, min_length=1, max_length=1000), BeforeValidator(as_tuple)]
    """Names of lm-eval tasks, or of those shipped here: `safemerge_refusal`, `safemerge_overrefusal`."""
    compare: Annotated[tuple[Role, ...], Field(strict=False, max_length=4), BeforeValidator(as_tuple)] = ()
    """Sources that are scored as well."""
    limit: int | None = Field(default=None, ge=1, le=10_000_000)
    """Only so many examples of each task; null: all."""
    batch_size: int | None = Field(default=None, ge=1, le=65536)
    """Examples scored together; null: 32 on a CPU, 64 on an accelerator."""
    num_fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Examples shown in the prompt; null: the task's own number."""
    chat_template: bool = True
    """Put prompts through the tokenizer's chat template, if it has one."""
    task_path: Text | None = None
    """A folder with further lm-eval tasks."""
    answer_tokens: int = Field(default=128, ge=1, le=100_000)
    """Tokens an answer to a harmful or harmless request may have; 32 is fast and does not see a refusal that turns."""
    backend: Text = "hf"
    """Which of lm-eval's models runs them, by lm-eval's own name: `hf` is transformers; `vllm` and others load every
    model from a folder, so that sources are written to $TMPDIR first, and measure no AUROC."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What models compute in while they are scored; `auto`: on an accelerator the checkpoint's, on a processor bfloat16
    where it computes in it and else float32, so that a recipe's scores repeat on any machine only where it is named."""
    auroc: bool = True
    """Also measure how likely a refusal is, of harmful and harmless requests, without decoding."""
    judge: Judge | None = None
    """Another model that judges the answers to harmful requests; null: none."""
    seed: Seed = 0
    """Seed of everything random in the evaluation."""

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        for key in ("tasks", "compare"):
            values = getattr(self, key)
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f'{key} names "{twice}" twice; expected each once')
        return self
