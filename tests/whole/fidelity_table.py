"""The fidelity matrix: every family with every kind of adapter, merged here and by PEFT, and compared.

`python -m tests.whole.fidelity_table docs/fidelity.md` writes the table; the tests run the same cases.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fixtures import peft_families

EXACT = 5e-7
"""Largest difference that float32 leaves between two ways of adding the same numbers of about 1."""

Lora = Callable[[str], dict[str, Any]]


def _embedding(family: str) -> str:
    return "wte" if family == "gpt2" else "embed_tokens"


def _norm(family: str) -> str:
    return "ln_f" if family == "gpt2" else "norm"


def _plain(**more: Any) -> Lora:
    return lambda family: {"target_modules": peft_families.attention(family), **more}


KINDS: Mapping[str, Lora] = {
    "LoRA": _plain(),
    "rsLoRA, patterns": lambda f: {
        "target_modules": peft_families.attention(f), "use_rslora": True,
        "rank_pattern": {peft_families.attention(f)[0]: 3}, "alpha_pattern": {peft_families.attention(f)[-1]: 5},
    },
    "all-linear, exclude_modules": lambda f: {
        "target_modules": "all-linear", "exclude_modules": [peft_families.attention(f)[0]],
    },
    "layers_to_transform": _plain(layers_to_transform=[1]),
    "lora_bias": _plain(lora_bias=True),
    "bias: all": _plain(bias="all"),
    "bias: lora_only": _plain(bias="lora_only"),
    "modules_to_save": lambda f: {"target_modules": peft_families.attention(f), "modules_to_save": [_norm(f)]},
    "lm_head saved": _plain(modules_to_save=["lm_head"]),
    "lm_head LoRA": lambda f: {"target_modules": [*peft_families.attention(f), "lm_head"]},
    "embedding LoRA": lambda f: {"target_modules": [*peft_families.attention(f), _embedding(f)]},
    "trained tokens": _plain(trainable_token_indices=[7, 3, 4]),
    "DoRA": lambda f: {"target_modules": [*peft_families.attention(f)], "use_dora": True},
    "experts": lambda f: {
        "target_modules": peft_families.attention(f), "rank_pattern": {"gate_up_proj": 2},
        "target_parameters": [f"{_ROUTED.get(f, 'mlp')}.experts.{p}" for p in ("gate_up_proj", "down_proj")],
    },
    "PiSSA": _plain(init_lora_weights="pissa"),
    "OLoRA": _plain(init_lora_weights="olora"),
}  # fmt: skip
"""Adapter kinds: family -> arguments of PEFT's LoraConfig."""

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
FULL = "full checkpoints"
"""The kind without an adapter: the fine-tuned and the safety side are models of their own."""
_ROUTED = {
    "glm4_moe": "mlp", "llama4": "feed_forward", "qwen3_next": "mlp", "ernie4_5_moe": "mlp", "hunyuan_moe": "mlp",
    "minimax": "mlp", "minimax_m2": "mlp", "deepseek_v3": "mlp", "phimoe": "mlp",
}  # fmt: skip
"""Mixtures among the wider families, and the module that holds their experts."""


def cases() -> list[tuple[str, str]]:
    """Every (family, kind) that PEFT can make, and full checkpoints of the wider families."""
    wide = ("LoRA", "all-linear, exclude_modules", "experts", FULL)
    found = [(f, k) for f in peft_families.FAMILIES for k in KINDS if k != "experts" or f in MIXTURES]
    found.insert(max(place for place, case in enumerate(found) if case[0] == "gpt_oss") + 1, ("gpt_oss", FULL))
    return found + [(f, k) for f in peft_families.WIDER for k in wide if k != "experts" or f in _ROUTED]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The largest error of each output, or the text it was refused with."""

    kept: float | str
    merged: float | str
    adapter: float | str


class Bench:
    """Makes each family's models once, and runs cases in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, family: str) -> Path:
        """The family's model."""
        path = self.folder / family
        return path if path.exists() else peft_families.save_model(family, path)

    def safety(self, family: str) -> Path:
        """A plain adapter on it, for the safety side."""
        path = self.folder / f"{family}-safety"
        lora = {"r": 3, "target_modules": peft_families.attention(family)}
        return path if path.exists() else peft_families.save_adapter(self.model(family), path, seed=9, **lora)

    def outcome(self, family: str, kind: str) -> Outcome:
        """Runs one case: kept as it is, merged with a safety adapter, and that once more as an adapter."""
        if kind == FULL:
            return self.full(family)
        base, safety = self.model(family), self.safety(family)
        work = self.folder / f"{family} {kind}".replace(" ", "-").replace(":", "").replace(",", "")
        adapter = peft_families.save_adapter(base, work / "adapter", **KINDS[kind](family))
        sources = {"aligned": str(base), "finetuned": {"adapter": str(adapter)}, "safety": {"adapter": str(safety)}}
        recipe = {"sources": sources, "gate": {"always": True}, "merge": {"method": "linear", "alpha": 0.75}}

        def kept() -> float:
            peft_families.fold(base, adapter, work / "kept")
            return _error(peft_families.tensors(work / "kept"), _oracle(base, adapter, work / "peft"))

        def merged() -> float:
            plan = peft_families.run(recipe, work / "merged")
            ours = peft_families.tensors(work / "merged")
            finetuned, safe = (peft_families.tensors(work / "peft"), _oracle(base, safety, work / "safe"))
            for line in plan["tensors"]:
                if line["action"] == "merge":
                    name = line["name"]
                    finetuned[name] = 0.75 * finetuned[name].double() + 0.25 * safe[name].double()
            return _error(ours, finetuned)

        def as_adapter() -> float:
            peft_families.run({**recipe, "output": {"format": "adapter"}}, work / "out")
            return _error(peft_families.tensors(work / "merged"), _oracle(base, work / "out", work / "again"))

        return Outcome(_tried(kept, self.folder), _tried(merged, self.folder), _tried(as_adapter, self.folder))

    def full(self, family: str) -> Outcome:
        """The same of full checkpoints, against a formula in float64."""
        work = self.folder / f"{family}-full"
        models = {
            name: peft_families.save_model(family, work / name, seed) for seed, name in enumerate(("tuned", "safe"), 5)
        }
        sources = {"aligned": str(self.model(family)), "finetuned": str(models["tuned"]), "safety": str(models["safe"])}
        tuned, safe = (peft_families.tensors(folder) for folder in models.values())

        def kept() -> float:
            peft_families.run({"sources": sources, "gate": {"never": True}}, work / "kept")
            return _error(peft_families.tensors(work / "kept"), tuned)

        def merged() -> float:
            recipe = {"sources": sources, "gate": {"always": True}, "merge": {"method": "linear", "alpha": 0.75}}
            plan = peft_families.run(recipe, work / "merged")
            wanted = dict(tuned)
            for line in plan["tensors"]:
                if line["action"] == "merge":
                    name = line["name"]
                    wanted[name] = 0.75 * tuned[name].double() + 0.25 * safe[name].double()
            return _error(peft_families.tensors(work / "merged"), wanted)

        return Outcome(_tried(kept, self.folder), _tried(merged, self.folder), "–")


def _oracle(base: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    return peft_families.tensors(peft_families.merge_with_peft(base, adapter, folder))


def _error(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest difference. PEFT merges into a tied embedding what was trained of the head or of it alone;
    such cases are compared by the model's output in the tests, and here for all other tensors."""
    common = [name for name in theirs if name in ours]
    extra = set(ours) ^ set(theirs)
    assert not extra - {"lm_head.weight"}, extra
    tied = set() if not extra else {n for n in common if n.rpartition(".")[0].endswith(("embed_tokens", "wte"))}
    return max(float((ours[n].double() - theirs[n].double()).abs().max()) for n in common if n not in tied)


def _tried(run: Callable[[], float], folder: Path) -> float | str:
    from safemerge_recipes.errors import SafemergeError

    try:
        return run()
    except SafemergeError as error:
        return str(error).replace(f"{folder}/", "")


def _shown(value: float | str, notes: dict[str, int]) -> str:
    if isinstance(value, float):
        return f"{value:.0e}"
    if value == "–":
        return value
    text = re.sub(r"^\S*/(adapter_config\.json|adapter_model\.safetensors|adapter): ", "", value)
    text = re.sub(r"\S*\.(h|layers)\.\d+\.[\w.]+", "<tensor>", text)
    return f"refused [{notes.setdefault(text, len(notes) + 1)}]"


HEADING = """\
# Fidelity

## Rules

**Names.** The output has the aligned model's names, in its order. A tensor of another source, or of an adapter, is
looked for under the same name. Where there is none, what training wrappers add is taken off (`_orig_mod.`,
`_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.` anywhere, `module.` in front, an adapter's own name in its keys,
`base_model.model.` in front of them), and then the one tensor is taken that has the same block number, the same end of
its path and the most of the rest in common, *within the same part of the model* (text, vision, audio, draft head,
projector, encoder, decoder, told by the path; a word above the blocks that no library uses for the language model as a
whole names a part of its own, so that nothing lands elsewhere). A full checkpoint is renamed only if that is one to
one, leaves nothing over and fits in shape; an adapter's name that fits two places is refused with both. The router of a
mixture may be called `router` or `gate`, where it stands beside experts. Renamings are noted in the plan.

**Experts** fused in one tensor or lying one by one are the same weights: a source is brought into the aligned model's
form, and adapters of either form fit either.

**Completeness.** A full checkpoint has every tensor of the aligned model and no other, but for buffers, a tied head and
tensors for multi-token prediction (a part of their own, or blocks behind the last one that config.json counts), which
stay the aligned model's where the fine-tuned side has none: "only in aligned". An adapter must hold every module that
`target_modules` names in those stacks of blocks that it adapts at all.

**Vocabulary.** Rows are matched by token where both tokenizers can be read, else by position. Appended tokens and cut
rows without a token are no change of vocabulary; anything else asks for `vocabulary:`. An embedding or head that PEFT
saved of its own accord, after a resize, is accepted; any other whole tensor that the adapter's config does not announce
is not. An adapter as output (`output.format: adapter`) holds a grown embedding and head, and a changed embedding that
is tied, in the same way: PEFT sets them in the model, which must have been given as many rows
(`model.resize_token_embeddings`, as the plan says). A head of its own above a tied model is in `modules_to_save`.

**Quantised weights** are told by their tensors, not by config.json. Read as exact operands, in any role: FP8 with a
scale for each block (`weight_scale_inv`), each row or the whole (`weight_scale`), int8 of compressed-tensors and of
LLM.int8 (`SCB`), packed int4 and int8 with zero points or without, GPTQ (4 and 8 bits, with `g_idx`; zeros less by one
unless the config says `gptq_v2`), AWQ (GEMM), NF4 and FP4 of bitsandbytes (`absmax`, plain or doubly quantised, blocks
within a row), MXFP4 (`_blocks`, `_scales`; packed by compressed-tensors), and NVFP4 of compressed-tensors and
ModelOpt (`weight_global_scale`, `weight_scale_2`, which is applied to the scales in float32 first). Their values are
float32, code times scale, rounded once. EXL2, EXL3, HQQ, Quanto, torchao, AQLM, EETQ, BitNet, MLX and other kinds of
GPTQ and AWQ are named, copied where no update touches them, and refused where one does. A scale is never merged,
whatever the scope says; codes without their scale are refused. What nothing changes is copied with its scales. A
changed weight is written plain (`output.quantized: dequantize`), or quantised again in the same FP8 format (`keep`:
scale = largest magnitude / 448, or the next power of two where `scale_fmt` is ue8m0; the error is measured on the
written file, `requantized_error`); weights that loaders hold as one tensor or require to be alike (the experts of a
block; q, k and v; gate and up) are written alike. Of GPTQ all weights are, as its config cannot name some that are not
codes. The output's `quantization_config` is the aligned model's, with what is written plain in its list of exceptions,
and goes where nothing quantised is left or over plain weights.

Each format is checked against a formula in float64, and against other code where a CPU runs it: transformers (FP8,
MXFP4), compressed-tensors (its own, AWQ by its converter, NVFP4), bitsandbytes (NF4, FP4, LLM.int8), AutoGPTQ 0.7.1
(its layer in plain torch, 4 and 8 bits, `g_idx` in any order; run by hand with `AUTO_GPTQ`, as no package on a CPU has
it today). An output of which some weights are plain is loaded by transformers on a CPU: FP8, MXFP4, compressed-tensors,
bitsandbytes, and GPTQ, of which all are plain then. AWQ's layers need more than a CPU: there, which modules
transformers would convert is asked of its own code.

**Noise floor.** Where V or Δ comes from quantised weights, the plan shows the expected ‖noise‖ of rounding beside ρ
(`noise_v`, `noise_delta`): of what is even in the cell of each code. Where that is half of ‖V‖² or ‖Δ‖², the plan
warns; where it is so in every gated tensor, a gate that looks at ρ is refused. Adapters on a quantised model have no
noise in Δ, as the quantised weight cancels.

**config.json and tokenizer** are the fine-tuned side's. Of config.json only the dtype, `vocab_size`,
`tie_word_embeddings` and `quantization_config` are changed, where the written weights need it. The tokenizer is
that of the first folder with a vocabulary (adapter, then the models under it); a chat template or tokenizer_config.json
of a folder before it lies over it. Configs are compared only in what both say.

## Table

Made by `make fidelity`: tiny random models of real families and adapters on them, written by transformers and
PEFT, are merged here and by PEFT's `merge_and_unload` in float32. A cell shows the largest difference of any
element of any tensor, or the refusal. *Kept*: everything is the fine-tuned side's. *Merged*: every gated tensor
is 0.75 fine-tuned + 0.25 safety. *Adapter*: the same with `output.format: adapter`, loaded and merged by PEFT.

*full checkpoints*: fine-tuned and safety side are models of their own, saved by transformers, against a formula in
float64; the families from Gemma 3n on are tried with fewer kinds of adapters.

(t) The head or the embedding of a tied model was trained alone. PEFT merges that into both; here the output has
both, untied, as the model was trained, and the two are compared by what the models compute.

| family | adapter | kept | merged | adapter |
|---|---|---|---|---|
"""


def table() -> str:
    """The whole document."""
    notes: dict[str, int] = {}
    lines = [HEADING]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for family, kind in cases():
            found = bench.outcome(family, kind)
            shown = (_shown(value, notes) for value in (found.kept, found.merged, found.adapter))
            mark = " (t)" if family in peft_families.TIED and kind in ("lm_head LoRA", "embedding LoRA") else ""
            lines.append(f"| {family} | {kind}{mark} | {' | '.join(shown)} |\n")
    lines.append("\n" + "".join(f"[{number}] {text}\n\n" for text, number in notes.items()).rstrip() + "\n")
    return "".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table())
