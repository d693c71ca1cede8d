"""Does a model folder load as what it is? Its config against its tensors, and its tensors against the architecture.

The first asks nothing of transformers. The second builds the architecture without weights and lets transformers look
for every tensor by name and shape, in a likeness of the folder: its config and tokenizer, and a file with its headers
and nothing behind them. So transformers opens no file of a stranger, nothing is fetched, and no code runs.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.checkpoint import Checkpoint, read_object, same_bytes
from safemerge_recipes.sources.model_config import dtype_edits, setting
from safemerge_recipes.sources.quantised.find import quantised
from safemerge_recipes.sources.side_files import (
    CONFIG_FILES,
    copy_side_files,
    half_a_tokenizer,
    holds_vocabulary,
    tokenizer_files,
)
from safemerge_recipes.sources.vocabulary import embedding_of, is_head, rowless, tokens_without_a_row
from safemerge_recipes.storage.files import written
from safemerge_recipes.storage.layout import SINGLE_FILE, lay_out

SHOWN = 3
"""Names of a kind that are told."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What transformers made of a folder.

    Attributes:
        problems: what keeps it from loading as it was meant.
        checked: what was looked at, in words.
        unchecked: what could not be, and why.
    """

    problems: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def disagreements(checkpoint: Checkpoint) -> Iterator[str]:
    """What config.json says of dtype, ties, vocabulary and quantisation that is not so; an unsound tokenizer."""
    config, tensors = checkpoint.config, checkpoint.tensors
    numbers: Counter[str] = Counter()
    for ref in tensors.values():
        numbers[ref.dtype] += ref.numel
    for key, value in dtype_edits(config, numbers).items():
        yield f"config.json: {key} is {setting(config, key)!r}; most weights are {value}"
    if "quantization_config" in config and not quantised(tensors):
        yield "config.json: has a quantization_config; no weight is quantised"
    embedding = embedding_of(tensors, config)
    head = next((name for name in tensors if is_head(name) and name.endswith(".weight")), None)
    tied = setting(config, "tie_word_embeddings") is True and head is not None and embedding is not None
    if tied and head and embedding and not same_bytes(tensors[head], tensors[embedding]):
        yield f"config.json: tie_word_embeddings is true; {head} and {embedding} differ"
    rows = {ref.shape[0] for name, ref in tensors.items() if name.endswith("embed_tokens.weight") and ref.shape}
    size = setting(config, "vocab_size")
    if len(rows) == 1 and type(size) is int and size not in rows:
        yield f"config.json: vocab_size is {size}; the embedding has {rows.pop()} rows"
    try:
        files = tokenizer_files(checkpoint.directory)
        half = half_a_tokenizer(files)
        count = tensors[embedding].shape[0] if embedding else None
        beyond = tokens_without_a_row(files, count) if count is not None else {}
    except SourceError as error:
        yield str(error)
        return
    if half:
        yield half
    if beyond and count:
        yield rowless(beyond, count)


def loads(checkpoint: Checkpoint) -> Loaded:
    """Loads config and tokenizer, and compares the inventory with what transformers' architecture expects.

    Takes seconds, most of them for loading transformers. Reads no weight.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        return Loaded(unchecked=("whether transformers loads it: transformers is not installed",))
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="safemerge-") as place:
            warnings.simplefilter("ignore")
            _likeness(checkpoint, Path(place))
            return _loads(Path(place), transformers)
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _likeness(checkpoint: Checkpoint, place: Path) -> None:
    """A folder with the same config, tokenizer and headers, and holes for weights."""
    own = {name: checkpoint.directory / name for name in CONFIG_FILES if (checkpoint.directory / name).is_file()}
    copy_side_files({**own, **tokenizer_files(checkpoint.directory)}, place)
    tensors = {name: (ref.dtype, ref.shape, SINGLE_FILE) for name, ref in checkpoint.tensors.items()}
    layout = lay_out(tensors, sum(ref.nbytes for ref in checkpoint.tensors.values()) + 1)
    with written(place / SINGLE_FILE, durable=False) as file:
        file.write(layout.headers[0])
        file.truncate(layout.sizes[0])


def _reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text[:200]}"


def _named(config: Mapping[str, Any]) -> str:
    """The first of a config's architectures; empty where it names none, or no name."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return first if isinstance(first, str) and first.isidentifier() else ""


def owned_class(config: Mapping[str, Any], transformers: Any) -> Any:
    """transformers' own class of a config's architecture; None where it has none, or where the config brings code.

    A config may name anything: only a model is taken for one.
    """
    kind, found = config.get("model_type"), getattr(transformers, _named(config), None)
    known = isinstance(kind, str) and kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known and model and not config.get("auto_map") else None


def _loads(folder: Path, transformers: Any) -> Loaded:
    said = read_object(folder / "config.json")
    named, owned = _named(said), owned_class(said, transformers)
    if owned is None:
        what = named or said.get("model_type") or "an architecture without a name"
        return Loaded(unchecked=(f"its names and shapes: transformers {transformers.__version__} has no {what}",))
    options = {"local_files_only": True, "trust_remote_code": False}
    checked, problems, unchecked = [], [], []
    try:
        transformers.AutoConfig.from_pretrained(folder, **options)
        checked.append("config: loaded by transformers, offline")
    except Exception as error:
        return Loaded(problems=(f"config.json: transformers cannot load it ({_reason(error)})",))
    if holds_vocabulary(path.name for path in folder.iterdir()):
        try:
            transformers.AutoTokenizer.from_pretrained(folder, **options)
            checked.append("tokenizer: loaded by transformers, offline")
        except Exception as error:
            unchecked.append(f"tokenizer: transformers cannot load it ({_reason(error)})")
    else:
        unchecked.append("tokenizer: there is none")
    try:
        _, found = owned.from_pretrained(
            folder, output_loading_info=True, device_map="meta", ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        if "quantization_config" in said or isinstance(error, ImportError):
            unchecked.append(f"its names and shapes: transformers needs more to load it ({_reason(error)})")
        else:
            problems.append(f"transformers cannot load it as {named} ({_reason(error)})")
        return Loaded(tuple(problems), tuple(checked), tuple(unchecked))
    problems += _inventory(named, found)
    left = sorted(map(str, found["unexpected_keys"]))
    checked.append(
        f"tensors: names and shapes are those of transformers' {named}"
        + (f", which leaves out {len(left)}, first {left[0]}" if left else "")
    )
    return Loaded(tuple(problems), tuple(checked), tuple(unchecked))


def _inventory(named: str, found: dict[str, Any]) -> Iterator[str]:
    missing = sorted(map(str, found["missing_keys"]))
    if missing:
        left = sorted(map(str, found["unexpected_keys"]))
        instead = f"; it has {', '.join(left[:SHOWN])} instead" if left else ""
        yield f"transformers' {named} lacks {len(missing)} tensors, first {', '.join(missing[:SHOWN])}{instead}"
    for name, own, wanted in sorted(found["mismatched_keys"])[:SHOWN]:
        yield f"{name}: is {tuple(own)}; transformers' {named} expects {tuple(wanted)}"
