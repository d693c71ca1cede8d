"""What tells sources' files, names and orientations apart: identities, names on disk, which way round a matrix lies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.orientation import input_first
from safemerge_recipes.sources.peft.module_names import DiskNames, different_starts
from safemerge_recipes.storage.identity import FileIdentity, check_unchanged, differs_here


def test_a_file_that_was_written_again_is_another_even_with_its_old_times(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    before = FileIdentity.of(file)
    check_unchanged([before])
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SourceError, match="changed while the recipe ran"):
        check_unchanged([before])
    file.unlink()
    with pytest.raises(SourceError, match="expected to stay"):
        check_unchanged([before])


def test_a_renamed_or_linked_file_keeps_its_key(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x")
    (tmp_path / "b").symlink_to(file)
    assert FileIdentity.of(file).key == FileIdentity.of(tmp_path / "b").key


def test_a_file_seen_through_another_mount_keeps_its_key_and_another_training_has_another(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    content = bytearray(os.urandom(1 << 20))
    first.write_bytes(content)
    shutil.copy2(first, second)  # another inode and time of change, as another mount would show
    one, other = FileIdentity.of(first), FileIdentity.of(second)
    assert one.key == other.key
    assert differs_here(one.here, other.here)
    assert not differs_here(one.here, "elsewhere:7:1:2")  # another machine has nothing to say
    stat = first.stat()
    second.write_bytes(content[: 1 << 18] + os.urandom(1 << 19) + content[-(1 << 18) :])
    os.utime(second, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FileIdentity.of(second).key != one.key


def test_names_in_memory_find_the_only_tensor_that_is_most_like_them() -> None:
    disk = DiskNames([
        "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight",
        "model.visual.layers.0.self_attn.q_proj.weight", "lm_head.weight",
    ])  # fmt: skip
    assert disk("lm_head.weight") == "lm_head.weight"
    assert disk("model.language_model.layers.1.self_attn.q_proj.weight") == "model.layers.1.self_attn.q_proj.weight"
    assert disk("model.layers.7.self_attn.q_proj.weight") is None
    assert DiskNames(["x.layers.0.a.w.weight", "y.layers.0.a.w.weight"])("z.layers.0.a.w.weight") is None
    assert different_starts("model.layers.0.q", "language_model.model.layers.0.q") == ("", "language_model")


def test_a_bias_tells_which_way_round_a_matrix_lies_and_square_ones_follow() -> None:
    turned = {
        "h.0.mlp.c_fc.weight": (8, 32), "h.0.mlp.c_fc.bias": (32,),
        "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,), "wte.weight": (50, 8),
    }  # fmt: skip
    assert input_first(turned, {}) == {"h.0.mlp.c_fc.weight", "h.0.attn.c_proj.weight"}
    straight = {name: shape[::-1] if len(shape) == 2 else shape for name, shape in turned.items()}
    assert not input_first(straight, {})
    no_bias = {name: shape for name, shape in turned.items() if not name.endswith("bias")}
    assert not input_first(no_bias, {})
