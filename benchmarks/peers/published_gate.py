"""The gate exactly as its formula is written: C = V Vᵀ / ‖V‖_F formed densely, ρ = cos(CΔ, Δ), in float32.

A plain reading of the published formula, to compare with in time and in value. As in the published script,
every projector C (d_out, d_out) stays in memory until all adapters have been looked at; unlike it, the two
models V comes from are read a matrix at a time. With --output, the selected updates are mixed, added to the
aligned weights and the full model is saved in one go.

    python -m benchmarks.peers.published_gate --base B --aligned A --finetuned F-adapter --tau 0.35
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.floor import weight_files

if TYPE_CHECKING:
    import torch


PLAIN = argparse.RawDescriptionHelpFormatter


class Folder:
    """The tensors of a checkpoint folder, read one by one."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        handles = [safe_open(file, "pt") for file in weight_files(path)]
        self.handles = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.handles[name].get_tensor(name)


class Adapter:
    """A plain LoRA folder as dense updates by base tensor name."""

    def __init__(self, path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        self.scale = config["lora_alpha"] / config["r"]
        self.factors = Folder(path)

    def names(self) -> list[str]:
        """Return the base tensors the adapter changes."""
        end = ".lora_A.weight"
        ours = (name for name in self.factors.handles if name.endswith(end))
        return [name.removeprefix("base_model.model.").removesuffix(end) + ".weight" for name in ours]

    def delta(self, name: str) -> torch.Tensor:
        """Return s·B·A (d_out, d_in) in float32."""
        module = "base_model.model." + name.removesuffix(".weight")
        A, B = self.factors[f"{module}.lora_A.weight"], self.factors[f"{module}.lora_B.weight"]
        return self.scale * (B.float() @ A.float())


def projector(V: torch.Tensor) -> torch.Tensor:
    """Return C = V Vᵀ / ‖V‖_F (d_out, d_out) of V (d_out, d_in), in V's dtype."""
    return V @ V.T / V.norm()


def cosine(C: torch.Tensor, delta: torch.Tensor) -> float:
    """Return ρ = cos(CΔ, Δ) over the flattened matrices, in their dtype."""
    import torch

    return torch.nn.functional.cosine_similarity((C @ delta).flatten(), delta.flatten(), dim=0).item()


def gate(base: Path, aligned: Path, finetuned: Path) -> dict[str, float]:
    """Return ρ of every matrix the fine-tuned adapter changes, all projectors held in memory meanwhile."""
    W_b, W_a, adapter = Folder(base), Folder(aligned), Adapter(finetuned)
    projectors = {name: projector(W_a[name].float() - W_b[name].float()) for name in adapter.names()}
    return {name: cosine(C, adapter.delta(name)) for name, C in projectors.items()}


def merge(aligned: Path, finetuned: Path, safety: Path, selected: set[str], alpha: float, output: Path) -> None:
    """Save the aligned model with αΔf + (1-α)Δs where selected and Δf elsewhere, in the aligned dtype."""
    from safetensors.torch import save_file

    W_a, F, S = Folder(aligned), Adapter(finetuned), Adapter(safety)
    tensors = {name: W_a[name] for name in W_a.handles}
    for name in F.names():
        delta = F.delta(name)
        if name in selected:
            delta = alpha * delta + (1 - alpha) * S.delta(name)
        tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    for file in aligned.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=PLAIN)
    for role in ("base", "aligned", "finetuned"):
        parser.add_argument(f"--{role}", type=Path, required=True)
    parser.add_argument("--safety", type=Path, help="needed with --output")
    parser.add_argument("--tau", type=float, default=0.35)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--output", type=Path, help="folder of the merged model")
    options = parser.parse_args()
    rho = gate(options.base, options.aligned, options.finetuned)
    if options.output:
        selected = {name for name, value in rho.items() if value < options.tau}
        merge(options.aligned, options.finetuned, options.safety, selected, options.alpha, options.output)
    print(json.dumps(rho, indent=1))


if __name__ == "__main__":
    main()
