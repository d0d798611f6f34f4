"""Logits of a checkpoint by stock transformers alone, for `benchmarks.reload`.

python -m benchmarks.peers.reload_stock CHECKPOINT PROMPTS.json OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load the checkpoint and keep its logits on every prompt."""
    place, prompts, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
    with torch.inference_mode():
        logits = {
            str(number): model(input_ids=torch.tensor([ids])).logits.clone()
            for number, ids in enumerate(json.loads(Path(prompts).read_text()))
        }
    if loaded := [name for name in sys.modules if name.split(".")[0] == "llmsurgery"]:
        raise SystemExit(f"this is to be stock transformers alone, but {loaded[0]} is imported")
    save_file(logits, out)


if __name__ == "__main__":
    main()
