"""`safemerge init`: the first recipe for a fine-tuned model, commented, from what its folder says of itself.

Knows which models were aligned from which, for the common families; everything else is told by the adapter or by the
user. What is written passes `safemerge validate`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.recipe.loading import parse_recipe
from safemerge_recipes.sharing.templates import EDITOR_LINE, shown_place
from safemerge_recipes.sources.checkpoint import read_object
from safemerge_recipes.sources.hub import fetch, open_repository
from safemerge_recipes.sources.peft.config import CONFIG_FILE, read_config

FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
    "qwen-2-7b": ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct"),
    "qwen-2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen-2.5-1.5b": ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen-2.5-3b": ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct"),
    "qwen-2.5-7b": ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
    "gemma-2-2b": ("google/gemma-2-2b", "google/gemma-2-2b-it"),
    "gemma-2-9b": ("google/gemma-2-9b", "google/gemma-2-9b-it"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
}
"""Unaligned and aligned model of common families."""
QUESTIONS: Mapping[str, str] = {
    "aligned": "The aligned model that was fine-tuned",
    "base": "The model before alignment (empty: none)",
    "safety": "A safety-tuned model or adapter (empty: none)",
    "name": "A name for the result",
}
"""What is asked on a terminal, by what it sets."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^@\s]+)?")


@dataclass(frozen=True, slots=True)
class Start:
    """What a first recipe names; "" where nothing is known yet.

    Attributes:
        finetuned: the fine-tuned model or adapter.
        adapter: what is known of it if it is an adapter, such as `LoRA of rank 16 on q_proj and v_proj`.
        onto: the role it lies on.
        aligned: the aligned model.
        base: the model before alignment.
        safety: a safety-tuned model or adapter.
        name: of the result.
    """

    finetuned: str = ""
    adapter: str = ""
    onto: str = "aligned"
    aligned: str = ""
    base: str = ""
    safety: str = ""
    name: str = ""


def look(place: str) -> Start:
    """What a place says of itself: an adapter, a model, or the name of a family.

    Raises:
        RecipeError: it is none of them, or an adapter that is not understood.
    """
    if place.lower() in FAMILIES:
        base, aligned = FAMILIES[place.lower()]
        return Start("./my-adapter", "of yours; put its folder here", "aligned", aligned, base, name=place.lower())
    folder = _folder(place)
    name = re.sub(r"[^\w.-]", "-", Path(place.partition("@")[0]).resolve().name)
    if not (folder / CONFIG_FILE).is_file():
        return Start(place, name=name)
    try:
        read_config(folder)  # refuses what a merge would
        config = read_object(folder / CONFIG_FILE)
    except (SourceError, OSError, ValueError) as error:
        raise RecipeError(f"{place}: {error}") from None
    modules = config.get("target_modules") or []
    listed = [modules] if isinstance(modules, str) else sorted(map(str, modules))
    shown = ", ".join(listed[:7]) + (f" and {len(listed) - 7} more" if len(listed) > 7 else "")
    told = f"{config.get('peft_type', 'LORA')} of rank {config.get('r', '?')} on {shown}"
    return _on(Start(place, told, name=name), str(config.get("base_model_name_or_path") or ""))


def _folder(place: str) -> Path:
    """A folder with what a place says of itself.

    Raises:
        RecipeError: there is neither such a folder nor such a repository.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in (CONFIG_FILE, "config.json")):
            raise RecipeError(f"{place}: has no {CONFIG_FILE} and no config.json; expected an adapter or a model")
        return path
    if not _HUB_ID.fullmatch(place):
        raise RecipeError(
            f"{place}: no such folder; expected that of an adapter or a model, a hub id, or one of "
            f"{', '.join(FAMILIES)}"
        )
    name, _, revision = place.partition("@")
    try:
        repository = open_repository(name, revision or None, place)
        fetch(repository, [one for one in (CONFIG_FILE,) if repository.has(one)])
    except SourceError as error:
        raise RecipeError(str(error)) from None
    return repository.path


def _on(start: Start, trained_on: str) -> Start:
    """With the model that an adapter was trained on, and the one that was aligned from."""
    for base, aligned in FAMILIES.values():
        if trained_on == base:  # the adapter stays on what it was trained on
            return replace(start, onto="base", base=base, aligned=aligned)
    return with_base(replace(start, aligned=trained_on))


def with_base(start: Start) -> Start:
    """With the model before alignment, where that of the aligned one is known."""
    known = {aligned: base for base, aligned in FAMILIES.values()}
    return start if start.base else replace(start, base=known.get(start.aligned, ""))


def is_adapter(place: str) -> bool:
    """Whether a place is the folder of an adapter, or, of one that is not here, is called like one."""
    path = Path(place).expanduser()
    if path.is_dir():
        return (path / CONFIG_FILE).is_file()
    return bool(re.search(r"lora|adapter|peft", place, re.I))


def write_start(start: Start, folder: Path) -> str:
    """The recipe, as YAML text with comments.

    Args:
        start: what it names.
        folder: where it will lie; relative paths start there.

    Raises:
        RecipeError: something that it needs is not known; the message says how to give it.
    """
    from jinja2 import Environment, StrictUndefined

    if not start.aligned:
        raise RecipeError(
            f"{start.finetuned}: it does not say which aligned model it was made from; say --aligned PLACE"
        )
    if not start.base and not start.safety:
        raise RecipeError(
            f"{start.aligned}: it is not known which model it was aligned from; say --base PLACE, or --safety PLACE "
            "for a safety-tuned model or adapter, or both for a gate"
        )
    named = {role: getattr(start, role) for role in ("base", "aligned", "finetuned", "safety")}
    places = {role: _scalar(shown_place(place, folder)) if place else "" for role, place in named.items()}
    if start.adapter:
        onto = ", onto: base" if start.onto == "base" else ""
        places["finetuned"] = f"{{adapter: {places['finetuned']}{onto}}}"
    if start.safety and is_adapter(start.safety):
        places["safety"] = f"{{adapter: {places['safety']}}}"
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = (files("safemerge_recipes.sharing") / "assets" / "start.yaml.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        editor_line=EDITOR_LINE, name=_scalar(f"{start.name}-safe"),
        path=_scalar(f"out/{start.name}-safe"), adapter=_comment(start.adapter), places=places,
    )  # fmt: skip
    text = f"{text.rstrip()}\n"
    parse_recipe(text, folder / "recipe.yaml")
    return text


def _scalar(text: str) -> str:
    """A text as it stands in YAML, also inside braces."""
    return text if re.fullmatch(r"[A-Za-z./~][\w./~@-]*", text) else json.dumps(text, ensure_ascii=False)


def _comment(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:200]
