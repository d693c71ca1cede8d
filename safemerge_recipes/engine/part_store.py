"""The store of a folder that several machines write: every file under a name of its writer's own until it is whole."""

from __future__ import annotations

import os
from pathlib import Path

from safemerge_recipes.engine.local_store import LocalStore
from safemerge_recipes.storage.layout import Layout


class PartStore(LocalStore):
    """The `Store` of one of several writers in a folder, for those that write whole files.

    No two writers open one file, and none is renamed while it is open, as NFS asks. A file that somebody else has
    sealed meanwhile stays: its bytes are the same.

    Args:
        folder: the folder, which exists.
        layout: the files.
        writer: what tells this writer's working names from others'.
    """

    def __init__(self, folder: Path, layout: Layout, writer: str = "") -> None:
        super().__init__(folder, layout)
        self.writer = writer or os.urandom(6).hex()

    def __reduce__(self) -> tuple[type[PartStore], tuple[Path, Layout]]:
        return PartStore, (self.folder, self.layout)  # another process is another writer

    def alone(self, shard: int) -> PartStore:
        """See `Store`."""
        return PartStore(self.folder, self.layout.alone(shard))

    def _working(self, shard: int) -> Path:
        return self.folder / f"{self.layout.files[shard]}.{self.writer}.part"

    def open(self) -> None:
        """See `Store`. Raises PlanError when the disk has no room."""
        self.close()
        for name in self.layout.files:
            (self.folder / name).unlink(missing_ok=True)  # it has no receipt: nobody knows what it holds
        self._check_room()
        self._make_all()

    def seal(self, shard: int) -> None:
        """See `Store`: flushed, closed, then renamed, unless somebody was faster."""
        with self._files.use(shard) as file:
            os.fsync(file)
        self._files.close()
        final, working = self.folder / self.layout.files[shard], self._working(shard)
        if final.exists():
            os.unlink(working)
        else:
            os.rename(working, final)

    def close(self) -> None:
        """See `Store`: working files of this writer go."""
        super().close()
        for shard in range(len(self.layout.files)):
            self._working(shard).unlink(missing_ok=True)
