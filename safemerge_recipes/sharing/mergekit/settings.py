"""What mergekit's parameters come to for every tensor, and tensors that share values as patterns.

A parameter is a value, a gradient over the blocks, or a list of values for parts of names; it may stand at a model, at
a slice or at the top, and the nearest that has a value for the tensor wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from safemerge_recipes.sharing.mergekit.reading import Input, MergeFile, Segment
from safemerge_recipes.tensor_names import block_index, block_of

MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method: whether each input has its own, and its default or MISSING."""

    name: str
    each: bool = False
    default: Any = MISSING


def is_plain(file: MergeFile) -> bool:
    """Whether every parameter is one value for all tensors, so that their names need not be known."""
    plain = not any(isinstance(value, list | dict) for one in _scopes(file) for value in one.values())
    return plain and file.segments[0].last is None


def filters(file: MergeFile) -> tuple[str, ...]:
    """Every part of names that a parameter asks for, in the order of the file."""
    found: dict[str, None] = {}
    for scope in _scopes(file):
        for setting in scope.values():
            for one in setting if isinstance(setting, list) else [setting]:
                if isinstance(one, dict) and one.get("filter") not in (None, "", "*"):
                    found[str(one["filter"])] = None
    return tuple(found)


def _scopes(file: MergeFile) -> list[Mapping[str, Any]]:
    """Every block of parameters of the file."""
    found = [file.settings]
    for segment in file.segments:
        found += [segment.settings, *(one.settings for one in segment.inputs)]
    return found


def place_of(file: MergeFile, name: str, blocks: int) -> tuple[Segment, float]:
    """The segment of a tensor and where its block lies in it, 0 to 1. What comes before and after the blocks counts
    as the beginning of the first and of the last segment."""
    index = block_index(name)
    if index is None:
        before = any(part in name for part in ("embed", "wte", "wpe"))
        return file.segments[0 if before else -1], 0.0
    for segment in file.segments:
        last = blocks if segment.last is None else segment.last
        if segment.first <= index < last:
            length = last - segment.first
            return segment, (index - segment.first) / (length - 1) if length > 1 else 1.0
    return file.segments[-1], 1.0


def values_of(
    file: MergeFile, parameters: Sequence[Parameter], owners: Sequence[Input], name: str, segment: Segment, at: float
) -> dict[str, Any]:
    """The value of every parameter for a tensor: of those that each input has, a tuple over `owners`.

    Raises:
        LookupError: one that is needed has none; `args` are the keys where it was looked for, and its name.
    """

    def value(parameter: Parameter, own: Input | None) -> Any:
        scopes = (*((own.settings,) if own else ()), segment.settings, file.settings)
        for scope in scopes:
            found = evaluate(scope.get(parameter.name), name, at)
            if found is not None:
                return found
        if parameter.default is MISSING:
            raise LookupError(own.keys if own else segment.keys, parameter.name)
        return parameter.default

    return {p.name: tuple(value(p, one) for one in owners) if p.each else value(p, None) for p in parameters}


def evaluate(setting: Any, name: str, at: float) -> Any:
    """The value of a setting for a tensor whose block lies at `at`, 0 to 1; None where it has none.

    Numbers of a gradient are anchors at equal distances, joined by straight lines; of other values that of its part.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and isinstance(setting[0], dict):
        for one in setting:
            if one.get("filter") in (None, "*") or one["filter"] in name:
                return evaluate(one["value"], name, at)
        return None
    steps = at * (len(setting) - 1)
    low = int(steps)
    if any(isinstance(one, bool | str) for one in setting):
        return setting[low]
    high = min(low + 1, len(setting) - 1)
    return (1 - (steps - low)) * setting[low] + (steps - low) * setting[high]


def patterns(names: Sequence[str], all_names: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Patterns that match exactly `names` among `all_names`: by block and part of the name where that is exact."""
    wanted, found = set(names), []
    for part in ("", *parts):
        cells: dict[tuple[str, str], list[tuple[int, set[str]]]] = {}
        for name in all_names:
            if part in name and (index := block_index(name)) is not None:
                stack = (block_of(name) or "").rpartition(".")[0]
                cells.setdefault((stack, part), []).append((index, {name}))
        for (stack, _), listed in cells.items():
            whole = [index for index, cell in _joined(listed) if cell <= wanted and not cell.isdisjoint(wanted)]
            if not whole:
                continue
            found.append(f"{_literal(stack)}.{_numbers(whole)}.*{_literal(part)}{'*' if part else ''}")
            wanted -= {n for index, cell in _joined(listed) if index in whole for n in cell}
    return [*found, *(_literal(name) for name in names if name in wanted)]


def _joined(listed: Sequence[tuple[int, set[str]]]) -> list[tuple[int, set[str]]]:
    cells: dict[int, set[str]] = {}
    for index, names in listed:
        cells.setdefault(index, set()).update(names)
    return sorted(cells.items())


def _numbers(indices: Sequence[int]) -> str:
    """`3`, `{0..3}` or `{1,4..6}` of increasing numbers."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    if len(runs) == 1 and len(runs[0]) > 1:
        return f"{{{runs[0][0]}..{runs[0][-1]}}}"
    numbers = [f"{{{run[0]}..{run[-1]}}}" if len(run) > 1 else str(run[0]) for run in runs]
    return numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"


def _literal(text: str) -> str:
    return "".join(f"\\{char}" if char in "*?[]{}\\" else char for char in text)


def grouped(values: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
    """(value, names that have it), the most frequent first."""
    found: list[tuple[Any, list[str]]] = []
    for name, value in values.items():
        for known, names in found:
            if known == value:
                names.append(name)
                break
        else:
            found.append((value, [name]))
    return sorted(found, key=lambda pair: -len(pair[1]))
