"""Two checkouts of the project over the same recipes: are the bytes, plans, messages and exit codes the same?

    python -m tests.whole.versions OLD/.venv/bin/safemerge NEW/.venv/bin/safemerge
    python -m tests.whole.versions OLD NEW --only ties sweep --work families

Every method and metric, adapters and checkpoints, one file and shards, written models and written adapters, recipes
that are refused, and a sweep, over tiny families that are made anew. Weights are compared by sha256, plans and
results value by value; keys that only the new one has, pages and cards are told apart. Ends with 1 if anything else
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from safetensors.torch import save_file

from tests.fixtures import chat_family, gated_family

FULL = {role: role for role in gated_family.ROLES}
LORA = {
    "base": "base",
    "aligned": "aligned",
    "finetuned": {"adapter": "finetuned-lora"},
    "safety": {"adapter": "safety-lora"},
}
SAME_RANK = {**LORA, "safety": {"adapter": "plain-lora"}}
ADAPTER = {"format": "adapter"}
WORDED = ("safemerge_report.html", "safemerge_scores.html", "README.md")
TIMED = ("safemerge_manifest.json", "safemerge.lock")  # hold times and versions
SKIPPED = {"seconds", "elapsed", "created", "versions", "version", "peak_memory", "when", "path", "timings"}


@dataclass(frozen=True)
class Trial:
    """One command over one family."""

    recipe: dict[str, Any]
    family: str = "llama"
    verb: str = "run"
    options: tuple[str, ...] = ()
    sources: dict[str, Any] = field(default_factory=lambda: FULL)


def merged(method: str, *, family: str = "llama", sources: Any = FULL, output: Any = None, **more: Any) -> Trial:
    """A trial that merges every gated tensor, or what `gate` says."""
    gate = more.pop("gate", {"always": True})
    recipe = {"gate": gate, "merge": {"method": method, **more}} | ({"output": output} if output else {})
    return Trial(recipe, family, sources=sources)


def gated(**gate: Any) -> Trial:
    """A trial of a gate; its merge is linear."""
    return Trial({"gate": gate, "merge": {"method": "linear", "alpha": 0.6}})


def refused(**recipe: Any) -> Trial:
    """A trial that ends in a message; what is not said is sound."""
    return Trial({"gate": {"tau": 0.5}, "merge": {"method": "linear"}, **recipe})


MASK = {"path": "mask.safetensors", "threshold": 0.4}
TRIALS = {
    "linear": merged("linear", alpha=0.7),
    "linear-sharded": merged("linear", alpha=0.3, family="qwen", output={"max_shard_size": 20000}),
    "linear-adapters": merged("linear", sources=LORA, alpha=0.5),
    "linear-factors": merged("linear", sources=SAME_RANK, alpha=0.5, space="factors"),
    "linear-weights": merged("linear", family="qwen", space="weights"),
    "slerp": merged("slerp", alpha=0.4),
    "slerp-weights": merged("slerp", alpha=0.4, space="weights", family="qwen"),
    "ties": merged("ties", density=0.3),
    "ties-adapters": merged("ties", sources=LORA, density=0.3, normalize=False, **{"lambda": 1.2}),
    "dare_linear": merged("dare_linear", density=0.5, seed=3),
    "dare_linear-factors": merged("dare_linear", sources=SAME_RANK, density=0.5, space="factors"),
    "dare_ties": merged("dare_ties", density=0.4, rescale="l1"),
    "task_arithmetic": merged("task_arithmetic", lambda_finetuned=0.9, lambda_safety=-0.5),
    "project": merged("project", gate={"metric": "rho", "lowest": 7}),
    "project-spectral": merged("project", normalize="spectral"),
    "project-rank": merged("project", normalize="rank:2", sources=LORA),
    "add_safety_vector": merged("add_safety_vector", gamma=0.5),
    "add_safety_vector-dare": merged("add_safety_vector", dare={"on": "delta", "density": 0.4}),
    "svd_k": merged("svd_k", rank=2, gamma=0.7),
    "mask": merged("mask", mask=MASK),
    "mask-zero": merged("mask", mask={**MASK, "fill": "zero", "invert": True}, family="qwen"),
    "replace": merged("replace", gate={"fraction": 0.3}),
    "drop": merged("drop", gate={"at_most": 0.6}),
    "mergekit": merged("mergekit:sce", options={"select_topk": 0.5}),
    "adapter": merged("linear", sources=LORA, output=ADAPTER, gate={"fraction": 0.5}),
    "adapter-truncated": merged("ties", sources=LORA, output={**ADAPTER, "rank": 3}),
    "tau": gated(tau=0.55),
    "exact": gated(tau=0.55, precision="exact"),
    "rho_ratio": gated(metric="rho_ratio", fraction=0.4, direction="above"),
    "cosine": gated(metric="cosine", lowest=5),
    "residual": gated(metric="residual", tau=0.9, rank=4),
    "norm_ratio": gated(metric="norm_ratio", fraction=0.5, per="module"),
    "e_diem": gated(metric="e_diem", fraction=0.5),
    "modules": gated(granularity="module", fraction=0.5),
    "blocks": gated(granularity="block", lowest=1),
    "random": gated(random={"count": 4, "seed": 2, "per": "module"}),
    "complement": gated(complement={"tau": 0.55}),
    "names": gated(names=["*.mlp.*", "/.*q_proj.*/"]),
    "rules": Trial({
        "gate": {"tau": 0.5}, "merge": {"method": "linear"}, "output": {"dtype": "float32"},
        "rules": [{"tensors": "*.0.*", "gate": {"tau": 0.7}, "merge": {"method": "ties"}},
                  {"tensors": "lm_head.weight", "keep": "aligned"}],
    }),
    "dry-run": Trial({"gate": {"tau": 0.55}}, options=("--dry-run",)),
    "wrong-key": refused(merge={"method": "linear", "alhpa": 0.5}, gate={"tua": 0.5}),
    "wrong-method": refused(merge={"method": "linaer"}),
    "wrong-bounds": refused(merge={"method": "linear", "alpha": 8}, gate={"tau": "high"}),
    "two-selectors": refused(gate={"tau": 0.5, "lowest": 3}),
    "unused-key": refused(merge={"method": "linear", "density": 0.5}),
    "no-match": refused(rules=[{"tensors": "model.nothing.*", "keep": "aligned"}]),
    "no-folder": Trial({"gate": {"tau": 0.5}}, sources={**FULL, "aligned": "alinged"}),
    "no-base": Trial({"gate": {"tau": 0.5}}, sources={"aligned": "aligned", "finetuned": "finetuned"}),
    "other-family": Trial({"gate": {"tau": 0.5}}, sources={**FULL, "finetuned": "../qwen/finetuned"}),
    "sweep": Trial({}, "chat", "sweep", ("--alpha", "0.3,0.6", "--limit", "4", "--seeds", "1", "--json")),
}  # fmt: skip


def make_families(root: Path) -> None:
    """`llama` in bfloat16, `qwen` in float32 and three shards, `chat`, which can be scored."""
    llama = gated_family.make_family(root / "llama", "llama", torch.bfloat16)
    gated_family.add_adapters(llama)
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    gated_family.write_adapter(llama / "plain-lora", llama / "aligned", 9, plain)
    qwen = gated_family.make_family(root / "qwen", "qwen2", torch.float32, shards=3)
    for family in (llama, qwen):
        shapes = {name: tensor.shape for name, tensor in gated_family.read_weights(family / "aligned").items()}
        masks = {name: gated_family.draw(name, "mask", *shape).float() for name, shape in shapes.items()}
        save_file(masks, root / family.path.name / "mask.safetensors")
    chat_family.make_family(root / "chat")


def carry_out(program: Path, side: str, name: str, trial: Trial, root: Path) -> tuple[int, str, Path]:
    """(exit code, what was said on standard error, output folder)"""
    folder = root / trial.family
    recipe = folder / "recipe.yaml"
    if trial.verb == "run":
        recipe = folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"sources": trial.sources, **trial.recipe}, sort_keys=False))
    output = root / "out" / side / name
    environment = {
        **os.environ, "SAFEMERGE_CACHE": str(root / "cache" / side), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "HF_HOME": str(root / "hub"), "COLUMNS": "120",
    }  # fmt: skip
    command = [str(program), trial.verb, str(recipe), "--output", str(output), *trial.options]
    if trial.verb == "run":
        command += ["--workers", "2", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / "stdout.json").write_text(done.stdout)
    said = done.stderr.replace(str(root / "out" / side), "OUT")
    return done.returncode, re.sub(r"\d+(\.\d)? s\b", "? s", said), output


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """The places where two JSON values differ, apart from those that hold times, versions and places."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key in SKIPPED:
                continue
            if key not in old or key not in new:
                yield f"{where}.{key} only in the {'old' if key in old else 'new'}"
            else:
                yield from differences(old[key], new[key], f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif old != new:
        yield f"{where}: {json.dumps(old)[:80]} became {json.dumps(new)[:80]}"


def compare_files(old: Path, new: Path) -> tuple[list[str], list[str]]:
    """(what differs, pages and texts that differ)"""
    files = sorted({path.relative_to(side) for side in (old, new) for path in side.rglob("*") if path.is_file()})
    found, worded = [], []
    for name in files:
        one, other = old / name, new / name
        if not one.exists() or not other.exists():
            found.append(f"{name}: only in the {'old' if one.exists() else 'new'}")
        elif name.name in TIMED or one.read_bytes() == other.read_bytes():
            continue
        elif name.suffix in (".html", ".svg", ".md", ".yaml"):
            worded.append(str(name))
        elif name.suffix in (".json", ".jsonl") and one.stat().st_size and other.stat().st_size:
            found += _summary(str(name), differences(*(_json(path) for path in (one, other))))
        else:
            digests = (hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (one, other))
            found.append(f"{name}: {' became '.join(digests)}")
    return found, worded


def _summary(name: str, places: Iterator[str]) -> list[str]:
    """One line for each place, whatever its number in a list; the first few values stand for the others."""
    kinds: dict[str, list[str]] = {}
    for place in places:
        kinds.setdefault(re.sub(r"\[\d+\]", "[…]", place.partition(": ")[0]), []).append(place)
    lines = [f"{name}{same[0]}" + (f", and {len(same) - 1} like it" if same[1:] else "") for same in kinds.values()]
    return lines[:6] + ([f"{name}: … {len(lines) - 6} more places"] if lines[6:] else [])


def _first_other(old: str, new: str) -> str:
    """The first line that is not the same."""
    pairs = zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    one, other = next(((one, other) for one, other in pairs if one != other), ("", ""))
    return f"{one!r} became {other!r}"


def _json(path: Path) -> Any:
    """The JSON of a file, or of each of its lines, without the two sides' own folders in its texts."""
    text = re.sub(r"/out/(old|new)/", "/out/SIDE/", path.read_text())
    if path.suffix != ".jsonl":
        return json.loads(text)
    lines = [json.loads(line) for line in text.splitlines()]
    return [line if "digest" not in line else line | {"digest": "of a line with seconds"} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the program `safemerge` of one checkout")
    parser.add_argument("new", type=Path, help="that of another")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="TRIAL")
    parser.add_argument("--work", type=Path, help="where families and outputs go; a temporary folder unless said")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work or Path(temporary)
        if not (root / "chat").exists():
            make_families(root)
        for stale in ("out", "cache"):
            shutil.rmtree(root / stale, ignore_errors=True)
        different = weights = 0
        for name in options.only:
            told = []
            sides = (("old", options.old.absolute()), ("new", options.new.absolute()))
            (code, said, old), (code_now, said_now, new) = (
                carry_out(program, side, name, TRIALS[name], root) for side, program in sides
            )
            if code != code_now:
                told.append(f"exit code {code} became {code_now}")
            if said != said_now:
                told.append(f"said other words: {_first_other(said, said_now)}")
            found, worded = compare_files(old, new)
            told += found
            added = all(" only in the new" in line for line in told)
            different += not added
            weights += not any(".safetensors" in line for line in told)
            rest = f" ({', '.join(worded)} differ)" if worded else ""
            state = "same   " if not told else "adds   " if added else "DIFFERS"
            print(f"{state} {name}, exit code {code_now}{rest}", *told, sep="\n    ", flush=True)
    total = len(options.only)
    print(f"{total - different} of {total} trials the same but for what was added, the weights' bytes in {weights}")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
