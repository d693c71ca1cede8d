"""The chat template among a model's files, looked at without loading a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safemerge_recipes.errors import CheckError
from safemerge_recipes.sources.checkpoint import MAX_JSON_BYTES
from safemerge_recipes.storage.files import content_of, text_of


def template_of(files: Mapping[str, Path]) -> str | None:
    """The text of the chat template, or None.

    Args:
        files: Name -> place of the files beside the weights.
    """
    if "chat_template.jinja" in files:
        return text_of(files["chat_template.jinja"], MAX_JSON_BYTES)
    if "tokenizer_config.json" not in files:
        return None
    try:
        found = json.loads(content_of(files["tokenizer_config.json"], MAX_JSON_BYTES)).get("chat_template")
    except (ValueError, AttributeError):
        return None  # transformers says better what is wrong with it
    if isinstance(found, list):  # several by name
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def check_template(files: Mapping[str, Path], wanted: bool) -> str | None:
    """A warning where prompts will go in bare although a chat template is wanted, else None.

    Args:
        files: Name -> place of the files beside the weights.
        wanted: The recipe's `evaluate.chat_template`.

    Raises:
        CheckError: There is a template and it is not sound.
    """
    if not wanted:
        return None
    text = template_of(files)
    if text is None:
        return (
            "no chat template among the tokenizer's files: prompts go in bare, as to a base model; add a "
            "chat_template.jinja to the fine-tuned source, or say `evaluate.chat_template: false`"
        )
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    marks = ("{% generation %}", "{%- generation %}", "{% endgeneration %}", "{%- endgeneration %}")
    for mark in marks:  # transformers' own, which Jinja does not know
        text = text.replace(mark, "")
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        message = f"chat template, line {error.lineno}: {error.message}; expected a sound Jinja template"
        raise CheckError(message) from None
    return None
