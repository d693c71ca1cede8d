"""Between lm-eval and the model it asks: tells how far a task is, keeps each answer, and gives those that are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safemerge_recipes.evaluation.store import Store, key_of


class Listening:
    """Stands before lm-eval's model: says how far it is, and answers what is kept without asking it again.

    Args:
        loaded: lm-eval's model.
        store: Where answers are kept, if anywhere.
        key: Names the model and the task there.
        tell: Told how many requests are answered, and of how many.
    """

    def __init__(self, loaded: Any, store: Store | None, key: str, tell: Callable[[int, int], None]) -> None:
        self._known: dict[str, Any] = {} if store is None else store.answers(key)
        self._store, self._key, self._tell = store, key, tell
        kinds = ("generate_until", "loglikelihood")
        self._asked = {kind: getattr(type(loaded), kind).__get__(loaded) for kind in kinds}
        self._done = self._total = 0
        self.model = loaded
        loaded.generate_until = lambda requests, **o: self._answer("generate_until", requests, o)
        loaded.loglikelihood = lambda requests, **o: self._answer("loglikelihood", requests, o)
        loaded.set_cache_hook(self)

    def _answer(self, kind: str, requests: list[Any], options: dict[str, Any]) -> list[Any]:
        sampled = kind == "generate_until" and any(one.args[1].get("do_sample") for one in requests)
        names = [key_of(kind, one.args[0], one.args[1] if kind == "loglikelihood" else None) for one in requests]
        left = [one for one, name in zip(requests, names, strict=True) if sampled or name not in self._known]
        self._done, self._total = len(requests) - len(left), len(requests)
        self._tell(self._done, self._total)
        self._keeping = self._store is not None and not sampled
        fresh = iter(self._asked[kind](left, **options) if left else ())
        return [
            next(fresh) if sampled or name not in self._known else _as_given(self._known[name])
            for name in names
        ]  # fmt: skip

    def add_partial(self, kind: str, request: tuple[Any, Any], answer: Any) -> None:
        """Is lm-eval's cache hook: called with every answer as soon as it is there."""
        self._done = min(self._done + 1, self._total)
        self._tell(self._done, self._total)
        if self._keeping and self._store is not None:
            name = key_of(kind, request[0], request[1] if kind == "loglikelihood" else None)
            self._store.keep_answer(self._key, name, answer)


def _as_given(answer: Any) -> Any:
    return tuple(answer) if isinstance(answer, list) else answer
