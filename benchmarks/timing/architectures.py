"""The shapes of the synthetic models: tensor names, sizes, config.json. Holds no values, writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

ROLES = ("base", "aligned", "finetuned", "safety")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model: its config.json, its tensors in checkpoint order, and which modules its adapters train."""

    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    adapted: tuple[str, ...] = ATTENTION + MLP
    shard_bytes: int | None = None
    sparse: bool = False
    roles: tuple[str, ...] = ROLES
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of the tensors that are not BF16."""
    repeated: bool = False
    """Matrices that no adapter changes are one piece of random numbers over and over, as nothing looks at them."""

    def adapted_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the weights an adapter changes, with their shapes (d_out, d_in), in checkpoint order."""
        ends = tuple(f".{module}.weight" for module in self.adapted)
        return {name: shape for name, shape in self.tensors.items() if name.endswith(ends)}


def _common(hidden: int, blocks: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "initializer_range": 0.02,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **more,
    }  # fmt: skip


def _attention(block: str, hidden: int, q: int, kv: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for module, shape in zip(ATTENTION, ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q)), strict=True):
        yield f"{block}.self_attn.{module}.weight", shape


def _mlp(path: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for module, shape in zip(MLP, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
        yield f"{path}.{module}.weight", shape


def _norms(block: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{block}.input_layernorm.weight", (hidden,)
    yield f"{block}.post_attention_layernorm.weight", (hidden,)


def _model(vocab: int, hidden: int, blocks: list[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    ends = [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]
    return dict([("model.embed_tokens.weight", (vocab, hidden)), *blocks, *ends])


def llama(
    hidden: int, blocks: int, width: int, heads: int, kv_heads: int, vocab: int,
    shard_bytes: int | None = None, sparse: bool = False,
) -> Architecture:  # fmt: skip
    """Return a Llama: 9 tensors a block and 3 outside the blocks."""
    config = _common(
        hidden, blocks, heads, kv_heads, vocab,
        architectures=["LlamaForCausalLM"], model_type="llama", intermediate_size=width,
        attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    inside: list[tuple[str, tuple[int, ...]]] = []
    for i in range(blocks):
        block = f"model.layers.{i}"
        inside += _attention(block, hidden, hidden, hidden // heads * kv_heads)
        inside += _mlp(f"{block}.mlp", hidden, width)
        inside += _norms(block, hidden)
    return Architecture(config, _model(vocab, hidden, inside), shard_bytes=shard_bytes, sparse=sparse)


def qwen3_moe(
    hidden: int, blocks: int, experts: int, width: int, heads: int, kv_heads: int, vocab: int,
    shard_bytes: int,
) -> Architecture:  # fmt: skip
    """Return a Qwen3-MoE by its names on disk: three small matrices an expert; adapters train attention."""
    head = hidden // heads
    config = _common(
        hidden, blocks, heads, kv_heads, vocab,
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", intermediate_size=4 * width,
        moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=4, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], head_dim=head, attention_bias=False,
    )  # fmt: skip
    inside: list[tuple[str, tuple[int, ...]]] = []
    for i in range(blocks):
        block = f"model.layers.{i}"
        inside += _attention(block, hidden, hidden, head * kv_heads)
        inside += [(f"{block}.self_attn.{norm}.weight", (head,)) for norm in ("q_norm", "k_norm")]
        inside.append((f"{block}.mlp.gate.weight", (experts, hidden)))
        for expert in range(experts):
            inside += _mlp(f"{block}.mlp.experts.{expert}", hidden, width)
        inside += _norms(block, hidden)
    return Architecture(config, _model(vocab, hidden, inside), ATTENTION, shard_bytes)


def deepseek_v3(blocks: int = 61, dense: int = 3, vocab: int = 129280) -> Architecture:
    """Return DeepSeek-V3's published shape (671 B parameters) in bf16, without its extra prediction block."""
    hidden, experts, heads = 7168, 256, 128
    config = _common(
        hidden, blocks, heads, heads, vocab,
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", intermediate_size=18432,
        moe_intermediate_size=2048, n_routed_experts=experts, n_shared_experts=1, num_experts_per_tok=8,
        first_k_dense_replace=dense, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, n_group=8, topk_group=4, routed_scaling_factor=2.5,
    )  # fmt: skip
    inside: list[tuple[str, tuple[int, ...]]] = []
    for i in range(blocks):
        block = f"model.layers.{i}"
        attention = {
            "q_a_proj": (1536, hidden), "q_a_layernorm": (1536,), "q_b_proj": (heads * 192, 1536),
            "kv_a_proj_with_mqa": (576, hidden), "kv_a_layernorm": (512,), "kv_b_proj": (heads * 256, 512),
            "o_proj": (hidden, heads * 128),
        }  # fmt: skip
        inside += [(f"{block}.self_attn.{module}.weight", shape) for module, shape in attention.items()]
        if i < dense:
            inside += _mlp(f"{block}.mlp", hidden, 18432)
        else:
            inside.append((f"{block}.mlp.gate.weight", (experts, hidden)))
            inside.append((f"{block}.mlp.gate.e_score_correction_bias", (experts,)))
            inside += _mlp(f"{block}.mlp.shared_experts", hidden, 2048)
            for expert in range(experts):
                inside += _mlp(f"{block}.mlp.experts.{expert}", hidden, 2048)
        inside += _norms(block, hidden)
    return Architecture(config, _model(vocab, hidden, inside), (), 8_000_000_000, sparse=True)


def in_fp8(full: Architecture) -> Architecture:
    """Return a DeepSeek as it is published: matrices in FP8 with a scale for each 128 x 128, but for routers."""
    tensors: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for name, shape in full.tensors.items():
        tensors[name] = shape
        if len(shape) == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            scale = f"{name}_scale_inv"
            tensors[scale] = (ceil(shape[0] / 128), ceil(shape[1] / 128))
            dtypes |= {name: "F8_E4M3", scale: "F32"}
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = {**full.config, "quantization_config": how}
    return replace(full, config=config, tensors=tensors, dtypes=dtypes, adapted=(*LATENT, *MLP), roles=("base",))


def llama_8b() -> Architecture:
    """Return Llama-3.1-8B's shape as most fine-tune it: two models, and adapters on q and v."""
    full = llama(4096, 32, 14336, 32, 8, 128256, shard_bytes=5_000_000_000)
    return replace(full, adapted=("q_proj", "v_proj"), roles=("base", "aligned"), repeated=True)


SIZES = {
    "tiny": lambda: llama(64, 2, 128, 4, 2, 320),
    "llama-0.3b": lambda: llama(1024, 16, 4096, 16, 4, 32000),
    "llama-1.1b": lambda: llama(2048, 16, 8192, 32, 8, 32000),
    "moe-small": lambda: qwen3_moe(512, 12, 64, 256, 8, 4, 32000, shard_bytes=200_000_000),
    "sparse-70b": lambda: llama(8192, 80, 28672, 64, 8, 128256, shard_bytes=5_000_000_000, sparse=True),
    "llama-8b": llama_8b,
    "sparse-8b": lambda: llama(4096, 32, 14336, 32, 8, 128256, shard_bytes=5_000_000_000, sparse=True),
    "sparse-405b": lambda: llama(16384, 126, 53248, 128, 8, 128256, shard_bytes=5_000_000_000, sparse=True),
    "blocks-70b": lambda: llama(8192, 4, 28672, 64, 8, 320, shard_bytes=1_000_000_000, sparse=True),
    "block-70b": lambda: llama(8192, 1, 28672, 64, 8, 320),  # one block of a 70 B model: its largest matrices
    "headers-671b": deepseek_v3,
    "fp8-671b": lambda: in_fp8(deepseek_v3(3, 1, 320)),  # one dense and two of its 58 blocks of experts
}
