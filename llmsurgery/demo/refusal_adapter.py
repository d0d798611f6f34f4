"""Train the demo's LoRA adapter: the benign task of `refuse`, as an adapter on `refuse-aligned`.

As with all weights, the refusals fall although none of the rows has to do with them. It is for methods that repair an
adapter.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOG = logging.getLogger("llmsurgery.demo.build")

RANK, ALPHA = 8, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Tune = Callable[["PreTrainedModel", "PreTrainedTokenizerFast"], None]
Measure = Callable[["PreTrainedModel", "PreTrainedTokenizerFast"], Mapping[str, float]]


def build_adapter(aligned: Path, out: Path, seed: int, tune: Tune, measure: Measure) -> None:
    """Train the adapter and write it.

    Args:
        aligned: Folder of the aligned model, which is its base.
        out: Folder of the adapter.
        seed: Seed of the adapter.
        tune: Trains what moves in a model.
        measure: Measures the trained model.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(aligned)
    torch.manual_seed(seed + 8)
    base = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32).eval()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    tune(model, tokenizer)
    for name, value in measure(model.eval(), tokenizer).items():
        LOG.info("refuse-adapter: %s %.3f", name, value)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    weights = out / "adapter_model.safetensors"
    narrow = {name: value.to(torch.bfloat16) for name, value in load_file(weights).items()}
    save_file(narrow, weights, metadata={"format": "pt"})
    path = out / "adapter_config.json"
    settings = json.loads(path.read_text())
    # peft keeps the names in a set, whose order differs from run to run; the base is named, not where it lies.
    settings |= {"target_modules": sorted(MODULES), "base_model_name_or_path": aligned.name}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
