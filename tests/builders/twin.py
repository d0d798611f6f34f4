"""A further model of the same shapes: what a tiny checkpoint may have been fine-tuned from."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SEEDS = {"aligned": 1, "base": 2, "unaligned": 3}


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


def move(values: torch.Tensor) -> torch.Tensor:
    """Return values with noise of a tenth of their size."""
    if not values.is_floating_point():
        return values
    wide = values.float()
    return (wide + 0.1 * (wide.std(correction=0) + 0.01) * torch.randn_like(wide)).to(values.dtype)
