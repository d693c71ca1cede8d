"""YAML text to plain values with their places, and back. Stricter than PyYAML where that helps people.

Only `true` and `false` are booleans (`no` and `on` stay text), `1e-4` is a number, repeated keys and keys
that are not text are problems, tags are refused, and size, nesting and alias expansion are bounded.
Knows nothing of recipes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Keys = tuple[str | int, ...]
"""Keys and list positions from the top to a value."""

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 50

_INTEGER = re.compile(r"[-+]?[0-9]{1,30}|0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}


class YamlError(Exception):
    """The text cannot be read at all. `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True)
class Document:
    """A document's values, the line of each (from 1), and what is wrong with it as (line, path, message)."""

    value: Any
    lines: dict[Keys, int] = field(default_factory=dict)
    problems: list[tuple[int, Keys, str]] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """Composes nodes only; values are made in `_value`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = "!!" + tag.removeprefix("tag:yaml.org,2002:") if tag.startswith("tag:yaml") else tag
            raise YamlError(line, f"found the tag {shown}; expected plain YAML, without tags")
        self.count += 1
        if self.count > MAX_NODES:
            raise YamlError(line, f"found more than {MAX_NODES} values; expected a recipe")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(line, f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(text: str) -> Document:
    """The values of one YAML document; an empty one is None.

    Raises:
        YamlError: the text is not YAML, or passes a bound.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise YamlError(1, f"larger than {MAX_BYTES} bytes; expected a recipe")
    try:
        node = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"found the character U+{_code(error.character):04X}; expected printable text") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(text, error) from None
    except (ValueError, OverflowError, RecursionError) as error:
        # Such as an escape for a character that does not exist.
        raise YamlError(1, f"not YAML: {error}") from None
    document = Document(None)
    if node is not None:
        _expanded(node, {}, set())
        document.value = _value(node, (), document)
    return document


def _code(character: Any) -> int:
    return character if isinstance(character, int) else ord(character)


def _syntax_error(text: str, error: yaml.MarkedYAMLError) -> YamlError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    message = f"not YAML: {error.problem or error.context}"
    if mark and error.context and "alias" in f"{error.context} {error.problem}":
        message += "; text that starts with * or & needs quotes"
    elif error.problem and "undefined alias" in error.problem:
        message += "; text that starts with * needs quotes"
    elif error.problem and "found character '\\t'" in error.problem:
        message += "; indent with spaces"
    elif error.problem and "cannot start any token" in error.problem:
        message += "; put such text in quotes"
    elif error.problem and "mapping values are not allowed" in error.problem:
        message += '; put text that holds ": " in quotes'
    return YamlError(line, message)


def _expanded(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """How many values a node stands for once its aliases are written out.

    Raises:
        YamlError: more than `MAX_NODES`, or a node that holds itself.
    """
    line = node.start_mark.line + 1
    if id(node) in open_nodes:
        raise YamlError(line, "found a value that holds itself")
    if id(node) in known:
        return known[id(node)]
    open_nodes.add(id(node))
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_expanded(k, known, open_nodes) + _expanded(v, known, open_nodes) for k, v in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_expanded(part, known, open_nodes) for part in node.value)
    open_nodes.discard(id(node))
    known[id(node)] = total
    if total > MAX_NODES:
        raise YamlError(line, f"aliases expand to more than {MAX_NODES} values")
    return total


def _value(node: yaml.Node, path: Keys, document: Document) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(part, (*path, index), document) for index, part in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append((line, path, "found a list or mapping as a key; expected text"))
            continue
        key = _scalar(key_node)
        here = (*path, key)
        if not isinstance(key, str):
            document.problems.append((line, path, f"found {describe(key)} as a key; expected text"))
        elif key in result:
            first = document.lines[here]
            message = f"key given twice, on lines {first} and {line}; expected once"
            document.problems.append((line, here, message))
        else:
            document.lines[here] = line
            result[key] = _value(value_node, here, document)
    return result


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def describe(value: object) -> str:
    """A value in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)[:40]
    if isinstance(value, str):
        shown = value if len(value) <= 60 else value[:57] + "..."
        return json.dumps(shown, ensure_ascii=False)
    kind = "mapping" if isinstance(value, dict) else "list"
    return f"a {kind}" if value else f"an empty {kind}"


class _Dumper(yaml.SafeDumper):
    """Quotes text that this reader or a YAML 1.1 reader would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_implicit_resolver("!integer", re.compile(f"^(?:{_INTEGER.pattern})$"), list("-+0123456789"))
_Dumper.add_implicit_resolver("!float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    # repr keeps every bit; the tag is the one that the text resolves to, so that it stays plain.
    text = repr(value)
    tag = dumper.resolve(yaml.ScalarNode, text, (True, False))
    return dumper.represent_scalar(tag, text)


def _represent_int(dumper: yaml.SafeDumper, value: int) -> yaml.Node:
    return dumper.represent_scalar(dumper.resolve(yaml.ScalarNode, str(value), (True, False)), str(value))


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(int, _represent_int)


def write_yaml(value: object) -> str:
    """Block-style YAML of plain values, in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False)
