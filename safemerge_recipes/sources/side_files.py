"""Side files: what an output has beside its weights, which is what its sources have, byte for byte.

Config files and all others come from the first full model of the fine-tuned side. The tokenizer comes from the first
folder of that side that holds a vocabulary; what folders before it have of one (a chat template, a changed
tokenizer_config.json) lies over it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import ReadError, SourceError
from safemerge_recipes.sources.checkpoint import read_object
from safemerge_recipes.sources.family import Family
from safemerge_recipes.sources.model_config import edited
from safemerge_recipes.sources.vocabulary import rowless, same_tokenizer, tokens_without_a_row
from safemerge_recipes.storage.files import check_file, content_of, inside, pieces_of, written

CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Endings of what must be a file; other folders are nobody's business."""
_TOKENIZER_FOLDERS = ("additional_chat_templates",)
_NEVER = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".pkl",
    ".pickle",
    ".joblib",
    ".npy",
    ".npz",
    ".part",
    ".index.json",
)
MAX_FILE_BYTES = 2_000_000_000
"""Largest side file copied, in bytes."""
_NEVER_NAMES = ("README.md", ".gitattributes", ".gitignore", "training_args.bin", "trainer_state.json")


def _plain_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        name = path.name
        ours = name.startswith(("safemerge_", "safemerge.", "adapter_", "."))
        if ours or name.endswith(_NEVER) or name in _NEVER_NAMES or (path.is_dir() and not name.endswith(_FILES)):
            continue
        try:
            check_file(path, MAX_FILE_BYTES)
        except FileNotFoundError:
            continue  # a link that leads nowhere
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
        yield path


def _is_vocabulary(name: str) -> bool:
    return name in ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model") or name.endswith(
        (".tiktoken", "tokenizer.model", "sentencepiece.bpe.model")
    )


def _is_tokenizer(name: str) -> bool:
    return name.startswith(_TOKENIZER) or name.endswith((".model", ".tiktoken", ".jinja"))


def _chain(family: Family) -> list[Path]:
    """Folders that may own side files: those of the vocabulary's owner first, then what it was trained on."""
    models, owner = family.models, family.models[family.owner]
    folders = [owner.folder.path, owner.checkpoint.directory]
    if owner.folder.kind == "adapter":
        folders[1:1] = [models["aligned"].folder.path]
    folders += [models["aligned"].folder.path, models["aligned"].checkpoint.directory]
    return list(dict.fromkeys(folders))


def side_files(family: Family) -> dict[str, Path]:
    """Relative name -> source of every file that is copied beside the weights, and nothing else.

    Raises:
        SourceError: a file is a link that leads out of its folder, a pipe or a device, too large, or has an unprintable
            name.
    """
    chain = _chain(family)
    chosen: dict[str, Path] = {}
    owner = next((folder for folder in chain if (folder / "config.json").exists()), None)
    if owner is not None:
        chosen.update({path.name: path for path in _plain_files(owner) if not _is_tokenizer(path.name)})
    chosen.update(_tokenizer_of(chain))
    return dict(sorted(chosen.items()))


def _tokenizer_of(chain: Sequence[Path]) -> dict[str, Path]:
    """The tokenizer of the first folder with a vocabulary, under what the folders before it have of one."""
    found = [tokenizer_files(folder) for folder in chain]
    owner = next((number for number, files in enumerate(found) if any(map(_is_vocabulary, files))), len(found) - 1)
    chosen: dict[str, Path] = {}
    for files in reversed(found[: owner + 1]):
        chosen.update(files)
    return chosen


def holds_vocabulary(names: Iterable[str]) -> bool:
    """Whether one of some files is a tokenizer's vocabulary."""
    return any(map(_is_vocabulary, names))


def no_tokenizer(files: Mapping[str, Path]) -> str | None:
    """What to say of an output whose side files hold no vocabulary; None if they hold one."""
    if any(map(_is_vocabulary, files)):
        return None
    return "no source has a tokenizer's vocabulary (tokenizer.json and the like), so the output has none"


_WITHOUT_FILES = ("ByT5", "Canine", "Perceiver")
"""Tokenizers of bytes, which have no vocabulary."""
_WITH_MERGES = ("GPT2", "Qwen2", "Roberta", "Bart", "Whisper", "CLIP", "CodeGen", "Longformer", "LED")
"""Tokenizers by merges, which vocab.json alone does not make."""
_ABOUT = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files about a tokenizer that are none themselves."""


def half_a_tokenizer(files: Mapping[str, Path]) -> str | None:
    """What the files beside some weights lack of a tokenizer, where they hold a part of one that loads nowhere.

    A vocabulary may go by names that are not known here, so that any file which may be one counts.
    """
    if "tokenizer.json" in files:
        return None
    about = read_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    owner = str(about.get("tokenizer_class") or "")
    if "merges.txt" in files and "vocab.json" not in files:
        return "merges.txt: there is no vocab.json beside it; expected both, or tokenizer.json"
    if "vocab.json" in files and "merges.txt" not in files and owner.startswith(_WITH_MERGES):
        return (
            f"vocab.json: there is no merges.txt beside it, which {owner[:80]} needs; expected both, or tokenizer.json"
        )
    some = any(
        re.search(r"vocab|tok|spm|piece|bpe|tekken|\.model$|\.tiktoken$", name) for name in files.keys() - {*_ABOUT}
    )
    if owner and not some and not owner.startswith(_WITHOUT_FILES) and "auto_map" not in about:
        return f"tokenizer_config.json: names {owner[:80]}, no vocabulary lies beside it; expected tokenizer.json"
    return None


def check_tokens(family: Family, files: Mapping[str, Path], whole: bool) -> str | None:
    """What to warn of where the embedding has no row for a token of the tokenizer that is copied.

    Looking up such a token fails, so a whole model is not written with it. But sound models have one that no text holds
    (the tokenizer of Gemma 3 1B has an image's, one behind its last row): what the aligned model has already is told.

    Args:
        family: the models.
        files: the side files of the output.
        whole: whether it is a model of its own, and no adapter.

    Raises:
        SourceError: there is a token that not even the aligned model lacks a row for; or a file is not sound JSON.
    """
    rows = family.inventory[family.embedding].shape[0] if family.embedding else None
    tokens = tokens_without_a_row(files, rows) if rows is not None else {}
    if not tokens or rows is None:
        return None
    aligned = family.models["aligned"]
    told = rowless(tokens, rows)
    before = tokens_without_a_row(_tokenizer_of([aligned.folder.path, aligned.checkpoint.directory]), rows)
    if tokens.items() <= before.items():
        return f"{told}, as in the aligned model"
    if whole:
        place, where = files.get("tokenizer.json", files.get("added_tokens.json")), family.models[family.owner].folder
        other = place is not None and not same_tokenizer(place.parent, aligned.checkpoint.directory)
        more = ", or say `vocabulary: aligned` to write the aligned model's tokenizer" if other else ""
        raise SourceError(
            f"sources.{family.owner}: {where.label}: {told}; take it out of the tokenizer's files, or resize the "
            f"embedding (resize_token_embeddings) before training{more}"
        )
    return told


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Relative name -> file of a folder's tokenizer and chat templates."""
    found = {path.name: path for path in _plain_files(folder) if _is_tokenizer(path.name)}
    for name in _TOKENIZER_FOLDERS:
        if (folder / name).is_dir():
            inside(folder, name)
            found.update({f"{name}/{path.name}": path for path in _plain_files(folder / name)})
    return found


def only_tokenizer(files: Mapping[str, Path]) -> dict[str, Path]:
    """Those of the side files that an adapter's folder needs, so that it loads by itself: its tokenizer."""
    return {name: path for name, path in files.items() if _is_tokenizer(name) or name.startswith(_TOKENIZER_FOLDERS)}


def copy_side_files(
    files: Mapping[str, Path], folder: Path, edits: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Copies side files byte for byte, with the user's permissions; JSON files with the edits that they must have.

    Raises:
        ReadError: a file cannot be read.
        SourceError: a file is a blob of the hub's cache and not what its name says.
    """
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        with written(target) as file:
            try:
                if edits and edits.get(name):
                    file.write(edited(content_of(source, MAX_FILE_BYTES), edits[name]))
                else:
                    file.writelines(pieces_of(source, MAX_FILE_BYTES))
            except OSError as error:
                if error.filename is None:  # of the writing
                    raise
                raise ReadError(f"{source}: {error.strerror}; it was there when planned") from None
