"""A further model of the same shapes: what a tiny checkpoint may have been fine-tuned from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint

SEEDS = {"aligned": 1, "base": 2, "unaligned": 3}
RANK, ALPHA = 4, 8


def twin(source: Path, name: str) -> Path:
    """Return a copy of a checkpoint beside it whose weights are moved a little, made when first asked for."""
    root = source.with_name(f"{source.name}-{name}")
    if root.exists():
        return root
    shutil.copytree(source, root)
    torch.manual_seed(SEEDS[name])
    for path in sorted(root.glob("*.safetensors")):
        tensors = load_file(path)
        moved = {key: move(value) for key, value in tensors.items()}
        save_file(moved, path, metadata={"format": "pt"})
    return root


def adapter_of(source: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Return a LoRA adapter for a checkpoint, beside it, made when first asked for; its config is what peft needs."""
    root = source.with_name(f"{source.name}-adapter")
    if root.exists():
        return root
    root.mkdir()
    checkpoint = Checkpoint.open(source)
    structure = detect(checkpoint.config, checkpoint.tensors)
    # In a mixture of experts peft takes names of an MLP for all experts.
    targets = structure.select(["attention" if structure.experts else "linear"])
    torch.manual_seed(4)
    tensors = {}
    for target in targets:
        outputs, inputs = target.shape[::-1] if target.transposed else target.shape
        stem = f"base_model.model.{target.module}"
        tensors[f"{stem}.lora_A.weight"] = (0.1 * torch.randn(RANK, inputs)).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = (0.1 * torch.randn(outputs, RANK)).to(dtype)
    save_file(tensors, root / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(target.module for target in targets),
        "fan_in_fan_out": any(target.transposed for target in targets),
        "base_model_name_or_path": source.name,
    }
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


def move(values: torch.Tensor) -> torch.Tensor:
    """Return values with noise of a tenth of their size."""
    if not values.is_floating_point():
        return values
    wide = values.float()
    return (wide + 0.1 * (wide.std(correction=0) + 0.01) * torch.randn_like(wide)).to(values.dtype)
