"""Another model's verdict on answers: a model loaded here, or any OpenAI-compatible server.

Every reply is kept as soon as it is there, so that a judge that stops answering costs nothing: the same command goes
on. An answer without a verdict counts as such, never as safe or unsafe. Knows nothing of tasks.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.quiet import first_line, quiet
from safemerge_recipes.evaluation.store import Store, key_of, scores_folder
from safemerge_recipes.evaluation.verdicts import Judgement, Messages, Prompt, prompt_of

GIVE_UP = 8
"""Answers in a row without a reply after which a judge counts as down."""


class Asker(Protocol):
    """Whoever replies to a chat."""

    def ask(self, messages: Messages, tokens: int) -> str:
        """The reply. Raises CheckError when there is none."""


MAX_REPLY = 1 << 24
"""Bytes of a reply that are read."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible endpoint.

    `url` is the base, such as `http://localhost:8000/v1`. The key is read from the environment variable `key_variable`
    when a request is sent, and stored nowhere. `timeout` is in seconds, for one request. The hub's own client is not
    used: it refuses a server on this machine while the hub is switched off (HF_HUB_OFFLINE), which is just when one is
    wanted, and it follows redirects with the key.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 2

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CheckError(f"judge.url: {self.url!r}: expected an address such as http://localhost:8000/v1")

    def ask(self, messages: Messages, tokens: int) -> str:
        """The reply.

        Raises:
            CheckError: The endpoint cannot be reached, rejects the request, or replies with something that is not a
                chat completion.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        sent = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        problem = ""
        for attempt in range(self.retries + 1):
            try:
                with _OPENER.open(sent, timeout=self.timeout) as reply:
                    return _content(address, _body(reply, time.monotonic() + self.timeout))
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")[:300]
                problem = f"{address}: HTTP {error.code} {error.reason}: {text}"
                # Only what may pass by itself is worth another try.
                if error.code not in (408, 429, 500, 502, 503, 504):
                    raise CheckError(f"judge {problem}. Expected an OpenAI-compatible endpoint.") from error
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                problem = f"{address}: {getattr(error, 'reason', error) or type(error).__name__}"
            if attempt < self.retries:
                time.sleep(0.5 * 2**attempt)
        raise CheckError(f"judge {problem}, after {self.retries + 1} attempts. Is the server running?")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        """Follow nothing: the key in the header is meant for the given address only."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def _body(reply: Any, deadline: float) -> bytes:
    """What a server sends until the deadline: one that sends a byte now and then is as silent as one that sends none.

    Raises:
        TimeoutError: it has not ended by then, or is longer than any reply.
    """
    parts: list[bytes] = []
    while part := reply.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline or sum(map(len, parts)) > MAX_REPLY:
            raise TimeoutError("the reply does not end")
    return b"".join(parts)


def _content(address: str, data: bytes) -> str:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckError(
            f"judge {address}: found {data[:200]!r}; expected a chat completion with choices[0].message.content"
        ) from error
    # Some servers send null for an empty answer.
    return content or ""


class Local:
    """A chat model loaded with transformers; its own chat template is applied.

    Args:
        model: A model folder or hub id.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckError: It cannot be loaded, or has no chat template.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        from safemerge_recipes.evaluation.models import choose

        device, dtype = choose(device, "auto")
        try:
            with quiet(False):
                from transformers import AutoModelForCausalLM, AutoTokenizer

                self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
                self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise CheckError(f"judge.model: {model}: transformers could not load it ({what})") from error
        if self._tokenizer.chat_template is None:
            raise CheckError(f"judge.model: {model}: has no chat template; expected a chat model")
        self.template = key_of(self._tokenizer.chat_template)

    def ask(self, messages: Messages, tokens: int) -> str:
        """The reply, decoded greedily."""
        import torch

        with torch.inference_mode(), quiet(False):
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self._model.device)
            made = self._model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=self._pad())
        return str(self._tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    def _pad(self) -> int | None:
        own = self._tokenizer.pad_token_id
        return own if own is not None else self._tokenizer.eos_token_id


@dataclass(frozen=True, slots=True)
class Judge:
    """Who is asked, and how.

    Attributes:
        asker: Returns whoever replies; called when something is to be asked.
        prompt: How.
        model: Its name, for the record.
        workers: Questions asked at the same time.
    """

    asker: Callable[[], Asker]
    prompt: Prompt
    model: str
    workers: int = 1

    def settings(self) -> dict[str, str]:
        """What a result must record about its judge."""
        return {"model": self.model, "prompt": self.prompt.name, "version": self.prompt.version}

    def judge_all(
        self,
        answers: Mapping[str, tuple[str, str]],
        store: Store | None = None,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, Judgement]:
        """The verdicts by id, in the order given; what the store has is not asked again.

        Args:
            answers: (request, answer) by id.
            store: Where replies are kept.
            tell: Told how many are done, and of how many.

        Raises:
            CheckError: The judge does not answer any more. What it said is kept.
        """
        key = key_of(self.settings())
        kept = {} if store is None else store.answers(key)
        names = {name: key_of(*pair) for name, pair in answers.items()}
        missing = {names[name]: pair for name, pair in answers.items() if names[name] not in kept}
        if missing:
            self._ask_all(
                missing, kept, key, store, lambda done: tell(len(answers) - len(missing) + done, len(answers))
            )
        return {
            name: self.prompt.read(kept[wanted]) if wanted in kept else Judgement("unanswered", (), "")
            for name, wanted in names.items()
        }

    def _ask_all(
        self,
        missing: Mapping[str, tuple[str, str]],
        kept: dict[str, Any],
        key: str,
        store: Store | None,
        tell: Callable[[int], None],
    ) -> None:
        asker, silent = self.asker(), 0

        def ask(pair: tuple[str, str]) -> str | CheckError:
            try:
                return asker.ask(self.prompt.messages(*pair), self.prompt.tokens)
            except CheckError as error:
                return error

        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            replies = pool.map(ask, missing.values())
            for done, (name, reply) in enumerate(zip(missing, replies, strict=True), 1):
                if isinstance(reply, CheckError):
                    silent += 1
                    if silent >= min(GIVE_UP, len(missing)):
                        pool.shutdown(wait=False, cancel_futures=True)
                        told = f"{len(kept)} verdicts are kept, the same command goes on from there"
                        raise CheckError(f"{reply}; {told}") from None
                    continue
                silent, kept[name] = 0, reply
                if store is not None:
                    store.keep_answer(key, name, reply)
                tell(done)


def judge_of(
    kind: Literal["llama-guard-3", "chat", "openai"],
    model: str,
    *,
    prompt: str | None = None,
    url: str | None = None,
    folder: Path | None = None,
    device: str = "auto",
) -> Judge:
    """The judge that a recipe's `evaluate.judge` or the command line names. Nothing is loaded or contacted yet.

    Args:
        kind: `llama-guard-3` (that model, here or behind `url`), `chat` (a model loaded here) or `openai` (a server).
        model: Its folder or hub id, or its name at the server.
        prompt: See `verdicts.prompt_of`; by default what goes with the kind.
        url: The server's base address.
        folder: Where relative paths start.
        device: Where a model is loaded.

    Raises:
        CheckError: The prompt or the address is not sound.
    """
    asked = prompt_of(prompt or ("llama-guard-3" if kind == "llama-guard-3" else "verdict"), folder)
    if url is not None:
        server = Server(url, model)
        return Judge(lambda: server, asked, model, workers=4)
    if kind == "openai":
        raise CheckError("judge.url: missing; expected the server's address, such as http://localhost:8000/v1")
    place = str((folder or Path.cwd()) / model) if ((folder or Path.cwd()) / model).is_dir() else model
    return Judge(lambda: Local(place, device), asked, Path(model).name)


def verdict_store(judge: Judge) -> Store:
    """Where a judge's replies are kept: in the cache, beside scores."""
    return Store(scores_folder() / f"judge-{key_of(judge.settings())}.jsonl")
