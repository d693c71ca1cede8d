"""What a PEFT user does today: load the model and one adapter, merge_and_unload, save_pretrained.

python -m benchmarks.peers.peft_merge --model ALIGNED --adapter ADAPTER --output DIR
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "adapter", "output"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, options.adapter).merge_and_unload()
    merged.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)


if __name__ == "__main__":
    main()
