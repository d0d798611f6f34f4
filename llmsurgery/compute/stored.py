"""What a model without weights is filled with: stored tensors, and the constants that no checkpoint stores."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import STORED

_PIECE = 16 << 20
"""Bytes that are read at once where they are converted, so that a tensor does not stand in memory twice."""


def read_stored(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, spare: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a stored tensor on the CPU, read and not mapped.

    Args:
        checkpoint: Where it is stored.
        name: Its stored name.
        dtype: Dtype of the result, rounded as transformers rounds it.
        spare: Memory of the result's shape and dtype that a converted tensor may take, in place of new memory.
    """
    info = checkpoint.info(name)
    stored = STORED[info.dtype]
    if stored == dtype or not info.shape:
        return torch.from_numpy(checkpoint.read(name)).view(stored).to(dtype)
    values = torch.empty(info.shape, dtype=dtype) if spare is None else spare
    for start, stop in checkpoint.row_blocks(name, _PIECE):
        values[start:stop] = torch.from_numpy(checkpoint.read(name, start, stop)).view(stored)
    return values


def fill_constants(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, rotary frequencies and the like, as stock loading does."""
    for path, module in model.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        names = [name for name in names if name in module._non_persistent_buffers_set]
        for name in names:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if names:
            owner, parent = model, path
            while parent and owner is model:
                parent = parent.rpartition(".")[0]
                above = model.get_submodule(parent)
                owner = above if isinstance(above, PreTrainedModel) else model
            with torch.no_grad():
                owner._init_weights(module)
