"""Small sharded families of models for tests of the whole program, and ways to run it as a user does."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from safemerge_recipes.cli import app as cli

ROOT = Path(__file__).parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
          "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
          "mlp.down_proj": (32, 48)}  # fmt: skip
MODEL_ROLES = ("base", "aligned", "finetuned", "safety")


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 32)}
    for block in range(2):
        shapes |= {f"model.layers.{block}.{name}.weight": shape for name, shape in SHAPES.items()}
        shapes |= {
            f"model.layers.{block}.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return shapes | {"model.norm.weight": (32,), "lm_head.weight": (64, 32)}


def make_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    """A model folder with config, tokenizer and sharded weights."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    parts = [names[n::shards] for n in range(shards)]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        weight_map = {}
        for number, part in enumerate(parts):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"role": folder.name}))
    return folder


def make_family(root: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 3, seed: int = 0) -> Path:
    """base, aligned, finetuned and safety below `root`, and recipe.yaml, whose gate merges about half."""
    rng = np.random.default_rng(seed)
    models: dict[str, dict[str, torch.Tensor]] = {role: {} for role in MODEL_ROLES}
    for number, (name, shape) in enumerate(tensor_shapes().items()):
        base = rng.normal(0, 0.05, shape)
        left = rng.normal(size=(shape[0], 4))
        v = left @ rng.normal(size=(4, shape[-1])) * 0.01 if len(shape) == 2 else 0
        inside = left @ rng.normal(size=(4, shape[-1])) * 0.01 if len(shape) == 2 else 0
        noise = rng.normal(0, 0.02, shape)
        f = noise + (inside if number % 2 else 0)
        for role, values in zip(
            MODEL_ROLES, (base, base + v, base + v + f, base + v + rng.normal(0, 0.01, shape)), strict=True
        ):
            models[role][name] = torch.from_numpy(values).to(dtype).contiguous()
    for role, tensors in models.items():
        make_model(root / role, tensors, shards)
    return write_recipe(root)


def write_recipe(root: Path, *, sources: dict[str, str] | None = None, **parts: object) -> Path:
    """recipe.yaml below `root`; parts replace those of the default."""
    recipe: dict[str, object] = {
        "name": "small",
        "sources": sources or {role: f"./{role}" for role in MODEL_ROLES},
        "gate": {"tau": 0.6},
        "merge": {"method": "linear", "alpha": 0.8},
        "output": {"path": "out"},
    }
    path = root / "recipe.yaml"
    path.write_text(json.dumps(recipe | parts))  # JSON is YAML
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the program, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def spawn(*arguments: object, before: str = "", **options: object) -> subprocess.Popen[str]:
    """The program in a process of its own; `before` is Python that runs ahead of it."""
    text = f"{before}\nimport sys\nfrom safemerge_recipes.cli.app import main\nmain(sys.argv[1:])\n"
    command = [sys.executable, "-c", text, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


class Zygote:
    """Runs the program in children of a process that is already warm; see zygote.py."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        self.folder = folder
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, *arguments: object, before: str = "") -> tuple[int, str, str]:
        """(exit code or minus the signal, standard output, standard error)."""
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        names = ("SAFEMERGE_CACHE", "HF_HUB_OFFLINE")
        request = {
            "arguments": [str(a) for a in arguments], "before": before, "out": str(out), "err": str(err),
            "env": {name: os.environ[name] for name in names if name in os.environ},
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return os.waitstatus_to_exitcode(status), out.read_text(), err.read_text()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


# The manifest holds timings, the report the memory that was needed, the recipe where it lies; a lock file that
# nobody holds stays behind when a run is killed right after its output got its name.
_DIFFERS = ("safemerge_manifest.json", "safemerge_report.html", "safemerge_recipe.yaml", "safemerge.lock")


def digests(folder: Path, *, without: tuple[str, ...] = _DIFFERS) -> dict[str, str]:
    """Relative path -> sha256 of every file that the same recipe must give the same bytes."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in without):
        data = path.read_bytes()
        if path.name == "safemerge_plan.json" and without:
            plan = json.loads(data)
            del plan["summary"]["peak_memory"], plan["recipe"]
            data = json.dumps(plan).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder with mode, size and time, to see what was touched."""
    found = {}
    for path in sorted(root.rglob("*")):
        stat = path.lstat()
        found[path.relative_to(root).as_posix()] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found
