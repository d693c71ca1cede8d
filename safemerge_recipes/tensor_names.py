"""What a tensor's name says: its block, its module, its module type. No tables of architectures.

Checkpoints number their repeated blocks: in `model.layers.3.self_attn.q_proj.weight` the first number is the
block. Tensors outside numbered blocks (embeddings, output head, final norm) belong to none.
"""

from __future__ import annotations


def _parts(name: str) -> tuple[list[str], int | None]:
    parts = name.split(".")
    return parts, next((i for i, part in enumerate(parts) if part.isdigit()), None)


def block_of(name: str) -> str | None:
    """The numbered block a tensor belongs to, such as `model.layers.3`, or None."""
    parts, at = _parts(name)
    return None if at is None else ".".join(parts[: at + 1])


def block_index(name: str) -> int | None:
    """The number of the tensor's block, or None."""
    parts, at = _parts(name)
    return None if at is None else int(parts[at])


def stack_of(name: str) -> str | None:
    """The stack of blocks that a tensor belongs to, such as `model.layers`, or None."""
    block = block_of(name)
    return None if block is None else block.rpartition(".")[0]


def module_of(name: str) -> str:
    """The parent module within the block, such as `model.layers.3.self_attn`; the tensor's own without one."""
    parts, at = _parts(name)
    return ".".join(parts[: at + 2]) if at is not None and at + 2 < len(parts) else name


def module_type(name: str) -> str:
    """The kind of module, the same in every block and expert, such as `self_attn.q_proj`."""
    parts, at = _parts(name)
    rest = parts if at is None else parts[at + 1 :]
    kept = [part for part in rest if not part.isdigit()]
    return ".".join(kept[:-1] if len(kept) > 1 and kept[-1] in ("weight", "bias") else kept)


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor holds weights of linear layers in a numbered block: a 2-D `weight`, or fused experts."""
    if block_of(name) is None or min(shape, default=0) < 2:
        return False
    if len(shape) == 3:
        return "experts" in name.split(".") and not name.endswith("bias")
    return len(shape) == 2 and name.endswith(".weight")
