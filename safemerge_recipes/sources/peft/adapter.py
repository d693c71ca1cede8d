"""A PEFT adapter's folder, opened: its config, the keys of its weights, and which files these are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safemerge_recipes.sources.peft.config import CONFIG_FILE, AdapterConfig, read_config
from safemerge_recipes.sources.peft.keys import Keys, read_keys
from safemerge_recipes.storage.identity import FileIdentity


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter folder: its config and keys, and the identities of the files they were read from."""

    directory: Path
    config: AdapterConfig
    keys: Keys
    identities: tuple[FileIdentity, ...]

    @property
    def base(self) -> str | None:
        """The model that the adapter was made for, as its config names it."""
        return self.config.base

    @property
    def files(self) -> tuple[str, ...]:
        """Weights and config."""
        return tuple(one.path for one in self.identities)


def is_adapter(directory: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (directory / CONFIG_FILE).exists()


def open_adapter(directory: Path) -> Adapter:
    """The adapter of a folder. Reads its config and its weight file's header.

    Raises:
        SourceError: a file is missing or unsound, a key is unexpected, or the config asks for an update that
            is not computed here (PiSSA and others are named in the message).
    """
    config = read_config(directory)
    keys = read_keys(directory, config)
    return Adapter(directory, config, keys, (*keys.identities, FileIdentity.of(config.path)))
