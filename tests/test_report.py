"""Terminal summary, HTML report and model card: what they show, hostile names, size, and missing parts."""

from __future__ import annotations

import io
import math
import random
from typing import Any

import pytest
from rich.console import Console

from safemerge_recipes.report import print_plan, print_result

KINDS = {
    "self_attn.q_proj": ((4096, 4096), 0.707, 0.44),
    "self_attn.k_proj": ((4096, 4096), 0.707, 0.46),
    "self_attn.v_proj": ((4096, 4096), 0.69, 0.30),
    "self_attn.o_proj": ((4096, 4096), 0.70, 0.33),
    "mlp.gate_proj": ((11008, 4096), 0.52, 0.27),
    "mlp.up_proj": ((11008, 4096), 0.52, 0.24),
    "mlp.down_proj": ((4096, 11008), 0.85, 0.48),
}
RECIPE: dict[str, Any] = {
    "name": "llama-2-7b-gsm8k-safe",
    "description": "GSM8K fine-tune of Llama-2-7B-Chat with its safety restored.",
    "sources": {
        "base": "meta-llama/Llama-2-7b-hf",
        "aligned": "meta-llama/Llama-2-7b-chat-hf",
        "finetuned": {"adapter": "my-org/llama2-gsm8k-lora"},
        "safety": {"adapter": "./safety-lora"},
    },
    "gate": {"metric": "rho", "tau": 0.35},
    "merge": {"method": "linear", "alpha": 0.8},
}


def make_plan(blocks: int = 32, *, tau: float = 0.35, measured: bool = True, experts: int = 0, **changes: Any) -> dict:
    """A plan as the engine writes it, with values of a realistic size; decided by `rho < tau`."""
    draw = random.Random(1)

    def line(name: str, shape: tuple[int, ...], null: float | None, middle: float) -> dict[str, Any]:
        if null is None:
            reason = "not a matrix of a linear layer in a numbered block"
            return {
                "name": name, "shape": list(shape), "dtype": "BF16", "action": "keep", "reason": reason, "metric": None,
                "value": None, "rho": None, "rho_null": None, "norm_v": None, "norm_delta": None, "method": None,
                "alpha": None, "source": "finetuned",
            }  # fmt: skip
        rho = min(0.99, max(0.01, middle + draw.gauss(0, 0.06)))
        merged = rho < tau if measured else True
        sign = "<" if merged else "≥"
        return {
            "name": name, "shape": list(shape), "dtype": "BF16", "action": "merge" if merged else "keep",
            "reason": f"rho {rho:.4g} {sign} tau {tau:g}" if measured else "always", "metric": "rho",
            "value": rho if measured else None, "rho": rho if measured else None,
            "rho_null": min(1.0, null + draw.gauss(0, 0.02)) if measured else None, "rho_interval": 0.0,
            "norm_v": math.exp(draw.gauss(2.3, 0.3)) if measured else None,
            "norm_delta": math.exp(draw.gauss(-0.5, 0.3)) if measured else None,
            "method": "linear" if merged else None, "alpha": 0.8 if merged else None, **({} if merged else {"source": "finetuned"}),
        }  # fmt: skip

    tensors = [line("model.embed_tokens.weight", (32000, 4096), None, 0)]
    for block in range(blocks):
        wave = 0.14 * math.sin(block / blocks * math.pi * 1.4 + 0.3)
        for kind, (shape, null, middle) in KINDS.items():
            if experts and kind.startswith("mlp"):
                part = kind.removeprefix("mlp.")
                names = [f"model.layers.{block}.mlp.experts.{i}.{part}.weight" for i in range(experts)]
            else:
                names = [f"model.layers.{block}.{kind}.weight"]
            tensors += [line(name, shape, null, middle + wave) for name in names]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(line(f"model.layers.{block}.{norm}.weight", (4096,), None, 0))
    tensors += [line("model.norm.weight", (4096,), None, 0), line("lm_head.weight", (32000, 4096), None, 0)]
    merged = sum(t["action"] == "merge" for t in tensors)
    gated = sum(t["metric"] is not None for t in tensors)
    summary = {
        "tensors": len(tensors), "gated": gated, "merged": merged, "kept": gated - merged, "bytes_read": 40_432_123_904,
        "bytes_written": 13_476_839_424, "peak_memory": 1_310_720_000,
    }  # fmt: skip
    return {"recipe": RECIPE, "summary": summary, "tensors": tensors, "warnings": [], **changes}


def entry(value: float, n: int = 200, **more: Any) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {"value": value, "low": max(0, value - half), "high": min(1, value + half), "n": n, **more}


SCORES = {
    "models": {
        "merged": {
            "safemerge_refusal": {"refusal_rate,none": entry(0.93)},
            "safemerge_overrefusal": {"refusal_rate,none": entry(0.07)},
            "gsm8k": {"exact_match,strict-match": entry(0.268, 1319)},
        },
        "aligned": {
            "safemerge_refusal": {"refusal_rate,none": entry(0.965)},
            "safemerge_overrefusal": {"refusal_rate,none": entry(0.09)},
            "gsm8k": {"exact_match,strict-match": entry(0.215, 1319)},
        },
        "finetuned": {
            "safemerge_refusal": {"refusal_rate,none": entry(0.71)},
            "safemerge_overrefusal": {"refusal_rate,none": entry(0.05)},
            "gsm8k": {"exact_match,strict-match": entry(0.274, 1319)},
        },
    }
}
PROVENANCE = {
    "sources": {
        "base": {"label": "meta-llama/Llama-2-7b-hf", "kind": "model", "revision": "01c7f73d771dfac7d292323805ebc428287df4f9", "license": "llama2"},
        "aligned": {"label": "meta-llama/Llama-2-7b-chat-hf", "kind": "model", "revision": "f5db02db724555f92da89c216ac04704f23d4590", "license": "llama2"},
        "finetuned": {"label": "my-org/llama2-gsm8k-lora", "kind": "adapter", "revision": "0d5dbdbf3a4b6c8f3c4eb08ea5d3ff7f5f2f6c11", "license": "llama2"},
        "safety": {"label": "./safety-lora", "kind": "adapter", "revision": None, "license": "llama2"},
    },
    "versions": {"safemerge-recipes": "0.1.0", "torch": "2.13.0", "safetensors": "0.8.0", "python": "3.11.7"},
    "recipe": "name: llama-2-7b-gsm8k-safe\ngate:\n  metric: rho\n  tau: 0.35\nmerge:\n  method: linear\n  alpha: 0.8\n",
    "created": "2026-01-02T03:04:05+00:00",
    "timings": {"measure": 41.2, "write": 63.8},
}  # fmt: skip


def printed(call: Any, *args: Any, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    call(*args, Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


class TestTerminal:
    def test_counts_figures_and_scores_are_shown(self):
        plan = make_plan()
        result = {"output": "out/x", "bytes_written": 13_476_839_424, "seconds": 105.0, "peak_memory": 9e8, "scores": SCORES}
        text = printed(print_result, plan, result)
        summary = plan["summary"]
        assert f"{summary['merged']} of 224 gated tensors were merged, where ρ < 0.35" in " ".join(text.split())
        for kind in KINDS:
            members = [t for t in plan["tensors"] if t["name"].endswith(f"{kind}.weight")]
            row = next(row for row in text.splitlines() if row.startswith(kind)).split()
            assert row[1:3] == [str(sum(t["action"] == "merge" for t in members)), "32"]
        for expected in ("out/x", "13.5 GB", "2 min", "900 MB", "93.0 %", "n = 1319", "gsm8k: exact_match (strict-match)"):
            assert expected in text

    def test_projected_cost_is_shown_with_a_plan(self):
        assert "Projected: read 40.4 GB, write 13.5 GB, peak memory 1.31 GB." in printed(print_plan, make_plan())

    @pytest.mark.parametrize("width", [60, 80, 200])
    @pytest.mark.parametrize("plan", [make_plan(), make_plan(1), make_plan(130), make_plan(8, experts=8)])
    def test_no_line_is_wider_than_the_terminal(self, plan, width):
        text = printed(print_result, plan, {"scores": SCORES, "output": "o" * 300}, width=width)
        assert max(map(len, text.splitlines())) <= min(width, 100)
        assert "\x1b" not in text  # not a terminal: no colour
