"""A loaded model that becomes any model a graph describes, by patching the tensors that differ.

Nothing is written: a patched tensor gets exactly the bytes the engine would write, by the same code. Task
keys say what differs, so going from one merge to the next touches only what the two decide differently.
Knows transformers, but no scores and no recipe.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.engine.executors.threads import Threads
from safemerge_recipes.engine.journal import JOURNAL_FILE, Journal
from safemerge_recipes.engine.local_store import LocalStore
from safemerge_recipes.engine.produce import produce
from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.models import choose
from safemerge_recipes.evaluation.quiet import quiet
from safemerge_recipes.events import ignore
from safemerge_recipes.methods.tools import Tools
from safemerge_recipes.pipeline.preparing import as_source
from safemerge_recipes.planning.graph import Graph, Task
from safemerge_recipes.planning.prepared import Prepared
from safemerge_recipes.sources.side_files import copy_side_files, side_files
from safemerge_recipes.storage.arena import Arena, torch_dtype
from safemerge_recipes.storage.dtypes import DTYPES
from safemerge_recipes.storage.files import write_file
from safemerge_recipes.storage.layout import INDEX_FILE
from safemerge_recipes.storage.reader import Reader

if TYPE_CHECKING:
    import torch


class LiveModel:
    """A transformers model in memory, and the graph whose model it is.

    Attributes:
        model: The loaded model, in evaluation mode.
        tokenizer: The output's tokenizer.
        patched: Tensors that the last `become` changed.
    """

    def __init__(
        self, prepared: Prepared, output: Path | None = None, *, device: str = "auto", dtype: str = "auto"
    ) -> None:
        """Load the merged model from its finished `output`; without one, a full model among the sources.

        Args:
            prepared: What `pipeline.preparing.prepare` made.
            output: The folder the merge was written to.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            dtype: The dtype it computes in, or `auto`; see `evaluate.evaluate`.

        Raises:
            CheckError: transformers cannot load it, or the device is missing.
        """
        self.prepared = prepared
        self.device, self.dtype = choose(device, dtype)
        self.patched = 0
        if output is not None:
            self._load(output, prepared.graph)
        else:
            with tempfile.TemporaryDirectory(prefix="safemerge-") as scratch:
                self._load(Path(scratch), self._skeleton(Path(scratch)))

    def _skeleton(self, folder: Path) -> Graph:
        """Lay out the output's side files around a full source's weights; return that source's graph."""
        models = self.prepared.family.models
        # Every chain of adapters ends in a full model among the roles.
        role = next(role for role in models if models[role].adapter is None)
        copy_side_files(side_files(self.prepared.family), folder)
        checkpoint = models[role].checkpoint
        for file in checkpoint.files:
            target = folder / os.path.relpath(file, checkpoint.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
        index = checkpoint.directory / INDEX_FILE
        if index.exists():
            (folder / INDEX_FILE).symlink_to(index.resolve())
        return as_source(self.prepared, role)

    def _load(self, folder: Path, graph: Graph) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            with quiet(False):
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
                self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckError(
                f"model {folder.name}: transformers could not load it ({type(error).__name__}: {first}). "
                "`safemerge verify` checks a merged folder tensor by tensor."
            ) from error
        self.model.to(self.device).eval()
        self._held = {task.slot.name: task.key for task in graph.tasks}
        # Each storage once: of tied tensors transformers keeps the first, and patching it patches all.
        self._own: dict[str, torch.Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self._all: dict[str, torch.Tensor] = self.model.state_dict()

    def _find(self, task: Task) -> tuple[bool, torch.Tensor | None]:
        """(whether the model stores the tensor as the files do, its tensor unless it is tied to another)."""
        name, prefix = task.slot.name, getattr(self.model, "base_model_prefix", "")
        for known in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if known in self._all:
                fits = tuple(self._all[known].shape) == task.slot.shape and DTYPES[task.slot.dtype].torch is not None
                return fits, self._own.get(known)
        return False, None

    def become(self, graph: Graph) -> None:
        """Make the model the one that `graph` writes.

        Where the loaded model stores a tensor otherwise than the files do (fused experts), the graph is
        written to a temporary folder and loaded from there, which is slower but the same.

        Raises:
            SafemergeError: a source changed or holds values that are not finite.
        """
        changed = [task for task in graph.tasks if self._held.get(task.slot.name) != task.key]
        targets = [self._find(task) for task in changed]
        if not all(fits for fits, _ in targets):
            self._rewrite(graph)
        else:
            with Reader() as reader:
                arena = Arena()
                for task, (_, target) in zip(changed, targets, strict=True):
                    # From here until the copy is done the tensor is neither the old one nor the new one.
                    self._held.pop(task.slot.name, None)
                    if target is not None:
                        self._patch(target, self._bytes(task, reader, arena), task)
                    self._held[task.slot.name] = task.key
        self.patched = len(changed)

    def _bytes(self, task: Task, reader: Reader, arena: Arena) -> bytearray:
        """The bytes the engine writes for a task."""
        held, at = bytearray(task.slot.nbytes), 0
        tools = Tools(reader, arena, self.prepared.resources.memory)
        allow = self.prepared.recipe.output.allow_overflow
        for piece in produce(task, tools, threading.Event(), allow_overflow=allow):
            held[at : at + len(piece)] = piece
            at += len(piece)
        return held

    def _patch(self, target: torch.Tensor, held: bytearray, task: Task) -> None:
        import torch

        if not held:
            return
        values = torch.frombuffer(held, dtype=torch_dtype(task.slot.dtype))
        with torch.no_grad():
            target.copy_(values.reshape(task.slot.shape))

    def _rewrite(self, graph: Graph) -> None:
        with tempfile.TemporaryDirectory(prefix="safemerge-") as scratch:
            write_model(self.prepared, graph, Path(scratch))
            self._load(Path(scratch), graph)


class WrittenModel:
    """A model in a temporary folder, for backends that load folders alone; becomes any model a graph describes.

    Attributes:
        model: The folder.
        tokenizer: None: the folder's.
    """

    tokenizer = None

    def __init__(self, prepared: Prepared, output: Path | None = None) -> None:
        """Args: prepared: What `pipeline.preparing.prepare` made. output: The folder the merge was written to."""
        self.prepared, self.output = prepared, output
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.model: Path | None = None

    def become(self, graph: Graph) -> None:
        """Write the graph's model; the one before it is removed. The merge's own finished folder is used as it is."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None
        if self.output is not None and graph is self.prepared.graph:
            self.model = self.output
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="safemerge-")
        self.model = Path(self._scratch.name)
        write_model(self.prepared, graph, self.model)


def write_model(prepared: Prepared, graph: Graph, folder: Path) -> None:
    """Write a graph's model with its side files into an empty folder, not sealed."""
    journal = Journal(folder / JOURNAL_FILE, {}, {})
    try:
        Threads().run(graph, LocalStore(folder, graph.layout), prepared.resources, {}, journal, ignore)
    finally:
        journal.close()
    index = graph.layout.index_bytes()
    if index is not None:
        write_file(folder / INDEX_FILE, index)
    copy_side_files(side_files(prepared.family), folder)
