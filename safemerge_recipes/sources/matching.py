"""One inventory of names for full checkpoints that training or another library saved under other names.

A tensor keeps its name where the aligned model has it. The others are matched as an adapter's names are: by block
number, end of path and part of the model. A match counts only if it is one to one, leaves nothing over and fits in
shape; otherwise nothing is renamed, and what is missing is reported as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from safemerge_recipes.sources.parts import unwrapped
from safemerge_recipes.sources.peft.module_names import DiskNames
from safemerge_recipes.weights.algebra import Weight


def unwrap(own: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights without what training wrappers put into their names, unless two names become one."""
    plain = {unwrapped(name): weight for name, weight in own.items()}
    return plain if len(plain) == len(own) else dict(own)


def renamed(
    own: Mapping[str, Weight], like: Mapping[str, Weight], spare: Collection[str]
) -> tuple[dict[str, Weight], tuple[tuple[str, str], ...]]:
    """A role's weights under the aligned model's names, in their order, and (own name, name here) of the renamed.

    Args:
        own: the role's weights.
        like: the aligned model's.
        spare: own names that need no match, such as buffers.
    """
    extra = [name for name in own if name not in like and name not in spare]
    missing = {name: weight.shape for name, weight in like.items() if name not in own}
    find = DiskNames(missing)
    pairs = [(name, found) for name in extra if (found := find(name)) is not None and own[name].shape == missing[found]]
    if not pairs or len(pairs) != len(extra) or len({found for _, found in pairs}) != len(pairs):
        return dict(own), ()
    names = dict(pairs)
    return {names.get(name, name): weight for name, weight in own.items()}, tuple(pairs)
