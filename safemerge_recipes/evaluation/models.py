"""Opens what is scored for lm-eval: a folder or a loaded model in its wrapper, with the settings it runs under."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation.quiet import first_line
from safemerge_recipes.evaluation.refusal import MATCHER_VERSION
from safemerge_recipes.evaluation.suite import BACKENDS, PACKAGES


def wrap(
    model: Any, tokenizer: Any, peft: Path | str | None, device: str, dtype: str, batch_size: int | None
) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's wrapper of the model and the settings it runs under."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    if isinstance(model, str | Path):
        folder = Path(model).resolve()
        if not (folder / "config.json").is_file():
            raise CheckError(f"model {model}: found no config.json; expected a model folder")
        device, dtype = choose(device, dtype)
        batch_size = batch_size or (32 if device == "cpu" else 64)
        adapter = None if peft is None else str(Path(peft).resolve())
        if adapter and not Path(adapter, "adapter_config.json").is_file():
            raise CheckError(f"adapter {peft}: found no adapter_config.json; expected a PEFT adapter folder")
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
            wrapped = HFLM(
                pretrained=str(folder),
                tokenizer=tokenizer,
                dtype=dtype,
                device=device,
                batch_size=batch_size,
                peft=adapter,
            )
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise CheckError(
                f"model {model}: transformers could not load it ({what}). "
                "`safemerge verify` checks a merged folder tensor by tensor."
            ) from error
    else:
        if tokenizer is None:
            raise CheckError("evaluation of a loaded model: found no tokenizer; expected `tokenizer=`")
        if peft is not None:
            raise CheckError("evaluation of a loaded model: apply the adapter before, or pass the folder")
        batch_size = batch_size or (32 if model.device.type == "cpu" else 64)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    parameter = next(wrapped.model.parameters())
    template = getattr(tokenizer, "chat_template", None)
    settings = {
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "batch_size": batch_size,
        "threads": torch.get_num_threads() if parameter.device.type == "cpu" else None,
        "chat_template_sha256": None if template is None else _sha256(json.dumps(template)),
        "refusal_matcher": MATCHER_VERSION,
        "versions": versions(),
    }
    return wrapped, settings


def wrap_by(
    backend: str, folder: Path, peft: Path | str | None, device: str, dtype: str, batch_size: int | None
) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's model of this name for a folder and the settings it runs under."""
    from lm_eval.api.registry import get_model
    from transformers import AutoTokenizer

    if peft is not None:
        raise CheckError(f"evaluate.backend {backend}: adapters are applied with hf alone; expected a full model")
    given: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size or "auto"}
    if backend not in BACKENDS:  # those find their device and their batches themselves
        device, dtype = choose(device, dtype)
        given = {"device": device, "dtype": dtype, "batch_size": batch_size or (32 if device == "cpu" else 64)}
    try:
        template = getattr(AutoTokenizer.from_pretrained(folder), "chat_template", None)
        wrapped = get_model(backend)(pretrained=str(folder.resolve()), **given)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise CheckError(f"model {folder.name}: lm-eval's {backend} could not load it ({what})") from error
    settings = {
        **given,
        "device": str(getattr(wrapped, "device", backend)),
        "backend": backend,
        "threads": None,
        "chat_template_sha256": None if template is None else _sha256(json.dumps(template)),
        "refusal_matcher": MATCHER_VERSION,
        "versions": versions(),
    }
    return wrapped, settings


def choose(device: str, dtype: str) -> tuple[str, str]:
    """Return the device and dtype that `auto` stands for here; see `evaluate`."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckError(f"device {device}: no CUDA device is available here. Try `--device cpu`.")
    if dtype == "auto" and device == "cpu":
        dtype = "bfloat16" if _cpu_has_bfloat16() else "float32"
    return device, dtype


def _cpu_has_bfloat16() -> bool:
    """Return whether the processor computes in bfloat16; emulated, it is far slower than float32."""
    import torch

    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return True
    return False


def versions() -> dict[str, str]:
    """The packages that scores depend on."""
    return {package: metadata.version(package) for package in PACKAGES}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
