"""Edits of a model in memory that end in the very values that will be stored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor
from llmsurgery.checkpoint import decode, encode
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.compute.view import weight_view

BLOCK_ENTRIES = 2**18
"""Entries that are computed at once: temporaries of a few megabytes stay in the processor's cache."""


def write_low_rank(
    model: PreTrainedModel | StreamedModel,
    target: RoleTensor,
    stored: npt.NDArray[np.floating],
    left: torch.Tensor,
    right: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """Set a matrix of a loaded or streamed model to W + left @ right, rounded once to the stored dtype.

    Args:
        model: The model.
        target: The matrix.
        stored: W as stored, in the stored orientation, fp32.
        left: Left factor in the stored orientation [rows, rank], float64.
        right: Right factor [rank, columns], float64.
        keys: Inputs of the matrix [inputs, c].

    Returns:
        What the change adds at the keys after rounding [outputs, c], float64.
    """
    view = model.replacement(target) if isinstance(model, StreamedModel) else weight_view(model, target)
    u, v, at = left.cpu().numpy(), right.cpu().numpy(), keys.double().cpu().numpy()
    outputs = stored.shape[1] if target.transposed else stored.shape[0]
    added = np.zeros((outputs, at.shape[1]))
    step = max(1, BLOCK_ENTRIES // stored.shape[1])
    for start in range(0, len(stored), step):
        part = slice(start, start + step)
        before = stored[part].astype(np.float64)
        after = decode(encode(before + u[part] @ v, target.dtype), target.dtype)
        change = after - before
        if target.transposed:
            added += change.T @ at[part]
        else:
            added[part] = change @ at
        with torch.no_grad():
            view[part].copy_(torch.from_numpy(after))
    return torch.from_numpy(added)
