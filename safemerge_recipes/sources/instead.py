"""What lies in a folder that holds no model in safetensors, told by the names of its files, and the way from there.

Nothing is opened: a pickle least of all. Called where a source's weight files are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from safemerge_recipes.storage.layout import INDEX_FILE, SINGLE_FILE

_SHARDED = (
    (r"^zero_to_fp32\.py$|^global_step\d+$|^zero_pp_rank|^mp_rank_\d+_model_states\.pt$",
     "holds DeepSpeed's partitions of a training run; expected safetensors: run `python {place}/zero_to_fp32.py "
     "{place} {place}-whole --safe_serialization`, and copy config.json and the tokenizer files there"),
    (r"\.distcp$|^pytorch_model_fsdp", "holds shards of torch.distributed.checkpoint (FSDP); expected safetensors: "
     "run `accelerate merge-weights` on the folder of .distcp files, and copy config.json and the tokenizer files "
     "there"),
    (r"_world_size_\d+_rank_\d+", "holds a part for each rank of an FSDP run; expected safetensors: merge them with "
     "the trainer that wrote them (verl: `python -m verl.model_merger merge`), and save with transformers"),
    (r"^(iter_\d+|mp_rank_\d+.*|latest_checkpointed_iteration\.txt)$", "holds a Megatron checkpoint; expected "
     "safetensors: export it to the Hugging Face form with Megatron's or NeMo's converter"),
    (r"\.nemo$|^context$", "holds a NeMo checkpoint; expected safetensors: export it to the Hugging Face form with "
     "its converter"),
    (r"^lit_model\.pth$", "holds a LitGPT checkpoint; expected safetensors: `litgpt convert_from_litgpt`, then "
     "save_pretrained with transformers"),
    (r"^hf_model_\d+_\d+\.pt$|^recipe_state\.pt$", "holds a torchtune checkpoint, a pickle, which is never loaded; "
     "expected safetensors: train with `safe_serialization: true`, or load it with transformers and save_pretrained"),
    (r"\.(incomplete|part|partial|aria2|crdownload)$", "holds a download that did not end; expected safetensors: "
     "download the model again"),
    (r"^_CHECKPOINT_METADATA$|\.ocdbt$|^ocdbt\.process_\d+$", "holds an Orbax checkpoint of a JAX trainer; expected "
     "safetensors: export it with the trainer's converter to the Hugging Face form"),
    (r"^(shared_)?vocabulary\.(json|txt)$", "holds a model exported for CTranslate2; expected safetensors: use the "
     "model that it was exported from"),
    (r"^ndarray-cache\.json$|^tensor-cache\.json$", "holds a model compiled for MLC; expected safetensors: use the "
     "model that it was made from"),
    (r"^model_index\.json$|^diffusion_pytorch_model", "holds a pipeline of diffusers, which makes images; expected a "
     "language model"),
)  # fmt: skip
"""What trainers and exporters leave that is no model to merge, and the way from there."""
_OTHER = (
    (r"^ggml-.*\.bin$", "holds weights for llama.cpp (GGML); expected safetensors: use the model that it was made "
     "from"),
    (r"^qmodel\.pt$", "holds a model quantised by HQQ, a pickle, which is never loaded; expected safetensors: use the "
     "model before quantisation"),
    (r"^checkpoint-\d+$", "holds checkpoints of a training run in folders of their own and no model itself; expected "
     "the folder of one, such as {place}/checkpoint-N"),
    (r"\.(msgpack|h5)$", "holds weights for Flax or TensorFlow; expected safetensors: load it with transformers "
     "before version 5 (from_flax=True or from_tf=True), then save_pretrained"),
    (r"\.onnx(_data)?$|^onnx$|^openvino(_model.*)?$|\.(engine|plan|tflite|pte|mlmodelc?|mlpackage)$",
     "holds a model exported for inference (ONNX, OpenVINO, TensorRT, ExecuTorch, TFLite or Core ML); expected "
     "safetensors: use the model that it was exported from"),
    (r"\.(zip|tar|tgz|tar\.\w+|7z|rar)$", "holds an archive; expected safetensors: unpack it"),
    (r"\.ckpt$", "holds a checkpoint of a trainer (Lightning), a pickle, which can run code and is never loaded; "
     "expected safetensors: export the model from the trainer with save_pretrained"),
    (r"^pytorch_model\.bin\.index\.json$", "holds an index of pickled weights and not these; expected safetensors: "
     "download the model's *.safetensors"),
    (r"^(optimizer|scheduler)\.(pt|bin)$|^rng_state|^trainer_state\.json$", "holds the state of a training run "
     "(optimizer, scheduler) and no model; expected safetensors: take the folder in which the trainer saved the model"),
    (r"\.(bin|pth?|pkl|pickle|joblib)$", "holds pickled files, which can run code and are never loaded; expected "
     "safetensors: load the model with the program that wrote it, then save_pretrained with transformers"),
    (r"^tokenizer(_config)?\.json$|^tokenizer\.model$|^vocab\.json$", "holds a tokenizer and no weights; expected "
     "safetensors: download the model's *.safetensors, too"),
    (r"\.npz$", "holds weights for MLX; expected safetensors: use the model that it was made from, or `mlx_lm.fuse`"),
)  # fmt: skip
"""What else a folder may hold instead."""


def instead(place: Path | str, names: Sequence[str]) -> str:
    """What lies in a folder without safetensors of a known name, and the way out."""
    shards = [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if shards:
        return (
            f"holds {len(shards)} shards such as {shards[0]} and no {INDEX_FILE}, which says what belongs together; "
            "download it again with the index, or load it with transformers and save_pretrained"
        )
    if told := _told(_SHARDED, place, names):
        return told
    pickle = next(
        (name for name in names if re.fullmatch(r"(pytorch_model|model|consolidated).*\.(bin|pth?)", name)), ""
    )
    if pickle:
        return (
            f"holds {pickle}, a pickle, which can run code and is never loaded; expected safetensors. "
            f'If you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{place}', dtype='auto').save_pretrained('{place}-safetensors')\" "
            "and copy the tokenizer files"
        )
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf:
        return (
            f"holds {gguf}, weights quantised for llama.cpp; expected safetensors: use the model that it was made "
            f"from, or dequantise it with transformers: from_pretrained('{place}', gguf_file='{gguf}'), then "
            "save_pretrained"
        )
    original = next((name for name in names if re.fullmatch(r"consolidated.*\.safetensors", name)), None)
    if original:
        return (
            f"holds {original}, weights under the names of the original release; expected transformers' form: download "
            "its model*.safetensors, or convert it with transformers' script for this model"
        )
    other = next((name for name in names if name.endswith(".safetensors")), None)
    if other:
        return f"holds {other}; expected weights that are called {SINGLE_FILE}, rename it if it holds all of them"
    if told := _told(_OTHER, place, names):
        return told
    return f"no {SINGLE_FILE} and no {INDEX_FILE}; expected a model folder with safetensors"


def _told(table: Sequence[tuple[str, str]], place: Path | str, names: Sequence[str]) -> str | None:
    """The words of the first pattern that a name fits."""
    found = next((told for pattern, told in table if any(re.search(pattern, name) for name in names)), None)
    return found.format(place=place) if found else None
