"""A model folder seen through its headers: which tensors it holds and where. Reads no weights.

Works on the names on disk, as the hub's checkpoints have them, and keeps no table of architectures: the
folder's own inventory is the only authority on what a model consists of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.storage.dtypes import FLOAT_DTYPES
from safemerge_recipes.storage.layout import INDEX_FILE, SINGLE_FILE
from safemerge_recipes.storage.safetensors import MAX_VALUES, TensorRef, check_values, read_header

MAX_JSON_BYTES = 16_000_000
"""Largest config or index read, in bytes: an index of 100 000 tensors stays below it."""


MAX_NAME = 200
"""Longest file name accepted, in characters; file systems take 255 bytes, and working names are longer."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors: `tensors` by name in file order, `config` as parsed from config.json."""

    directory: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    files: tuple[str, ...]

    @property
    def tied(self) -> bool:
        """Whether the config ties the output head to the input embedding (transformers' default is yes)."""
        tied = setting(self.config, "tie_word_embeddings")
        return True if tied is None else bool(tied)


def read_json(path: Path, limit: int = MAX_JSON_BYTES, values: int = MAX_VALUES) -> Any:
    """The content of a JSON file. Raises SourceError when it is missing, huge, or not JSON."""
    try:
        if path.stat().st_size > limit:
            raise SourceError(f"{path}: larger than {limit} bytes; expected an ordinary JSON file")
        text = path.read_bytes()
        check_values(text, values)
        return json.loads(text.decode("utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; expected a JSON file there") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON: {str(error)[:200]}; expected an intact file") from None


def read_object(path: Path, limit: int = MAX_JSON_BYTES, values: int = MAX_VALUES) -> dict[str, Any]:
    """Like `read_json`, for files that must hold a JSON object."""
    value = read_json(path, limit, values)
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def inside(directory: Path, name: str) -> Path:
    """The path of file `name` of `directory`, refused when it leads out of it.

    The hub's cache keeps snapshot files as links into the repository's own `blobs` folder, and older downloads into
    a folder of one's own (`local_dir`) do the same: those count as inside.

    Raises:
        SourceError: the name is not a plain file name, or a link leads elsewhere.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or not name.isprintable() or len(name) > MAX_NAME:
        raise SourceError(f"{directory}: names the file {name[:200]!r}; expected a plain file name of this folder")
    path = directory / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if real.parent.name == "blobs" and real.parent.parent.name.startswith("models--"):
        allowed.append(real.parent)  # where older versions of the hub's library let a folder's links lead
    if not any(real.is_relative_to(place) for place in allowed):
        raise SourceError(f"{path}: a link that leads out of its folder; expected a file inside, copy it there")
    return path


def same_bytes(one: TensorRef, other: TensorRef) -> bool:
    """Whether two stored tensors are equal byte for byte. Reads up to the first difference, 4 MiB at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with open(one.path, "rb") as left, open(other.path, "rb") as right:
            left.seek(one.offset)
            right.seek(other.offset)
            for done in range(0, one.nbytes, 1 << 22):
                count = min(1 << 22, one.nbytes - done)
                if left.read(count) != right.read(count):
                    return False
    except OSError as error:
        raise SourceError(f"{one.path}: {error.strerror}; it was readable a moment ago") from None
    return True


def _weight_files(directory: Path) -> tuple[list[str], Mapping[str, str] | None]:
    if (directory / SINGLE_FILE).exists():
        return [SINGLE_FILE], None
    index = directory / INDEX_FILE
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise SourceError(f"{index}: has no usable weight_map; expected tensor names mapped to file names")
        files = sorted(set(weight_map.values()))
        for file in files:
            if not file.endswith(".safetensors"):
                raise SourceError(f"{index}: names {file[:200]!r}; expected files that end in .safetensors")
        return files, weight_map
    legacy = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    if legacy:
        raise SourceError(
            f"{directory}: holds {legacy[0]}, a pickle, which can run code and is never loaded; expected safetensors. "
            f'If you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('{directory}-safetensors')\" "
            "and copy the tokenizer files"
        )
    raise SourceError(f"{directory}: no {SINGLE_FILE} and no {INDEX_FILE}; expected a model folder with safetensors")


_QUANTISED = (
    (r".*\.weight_scale_inv", "FP8 by blocks: weight_scale_inv"),
    (r".*\.weight_packed", "packed integers of compressed-tensors: weight_packed"),
    (r".*\.qweight", "GPTQ or AWQ: qweight"),
    (r".*_blocks", "MXFP4: _blocks and _scales"),
    (r".*\.(absmax|quant_map|quant_state\..*)", "bitsandbytes 4-bit: quant_state"),
    (r".*\.SCB", "bitsandbytes 8-bit: SCB"),
    (r".*\.weight_scale", "scaled weights: weight_scale"),
)


def quantised(tensors: Mapping[str, TensorRef]) -> str | None:
    """How a checkpoint's weights are quantised, told by the tensors alone; None for plain weights."""
    for pattern, kind in _QUANTISED:
        first = next((name for name in tensors if re.fullmatch(pattern, name)), None)
        if first is not None:
            return f"{kind}, first {first}"
    odd = next((n for n, ref in tensors.items() if n.endswith(".weight") and ref.dtype not in FLOAT_DTYPES), None)
    return None if odd is None else f"{odd} is stored as {tensors[odd].dtype}"


def open_checkpoint(directory: Path) -> Checkpoint:
    """The inventory of a model folder.

    Raises:
        SourceError: weights or config are missing or unsound, the index and the files disagree, or the
            weights are quantised (their tensors are not the weights that a merge needs).
    """
    config = read_object(directory / "config.json")
    names, weight_map = _weight_files(directory)
    tensors: dict[str, TensorRef] = {}
    for file in names:
        path = inside(directory, file)
        if not path.exists():
            raise SourceError(f"{directory}: {INDEX_FILE} names {file[:200]!r}, which is missing; download it again")
        for name, ref in read_header(path).items():
            if name in tensors:
                raise SourceError(f"{path}: {name!r} is also in {tensors[name].path}; expected it once")
            if weight_map is not None and weight_map.get(name) != file:
                raise SourceError(f"{path}: holds {name!r}, which {INDEX_FILE} does not place there")
            tensors[name] = ref
    if weight_map is not None and len(weight_map) != len(tensors):
        missing = sorted(set(weight_map) - set(tensors))
        raise SourceError(
            f"{directory}: {INDEX_FILE} names {missing[0][:200]!r}, which no file holds ({len(missing)} such)"
        )
    if not tensors:
        raise SourceError(f"{directory}: its weight files hold no tensor")
    kind = quantised(tensors)
    if kind is not None and config.get("quantization_config"):
        raise SourceError(
            f"{directory}: its weights are quantised ({kind}); expected plain weights, "
            "use the model before quantisation (or save a dequantised copy) and quantise the merged one"
        )
    return Checkpoint(directory, tensors, config, tuple(str(directory / file) for file in names))
