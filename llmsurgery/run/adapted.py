"""A model with a LoRA adapter as the source of an operation: measured through peft, operated on with it merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmsurgery.arch.adapter import CONFIG, WEIGHTS, Adapter, low_rank
from llmsurgery.checkpoint import file_digest
from llmsurgery.run.prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor

Read = Callable[[str], npt.NDArray[np.floating]]


def attached(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Return the base with the adapter as users load it."""
    from llmsurgery.train.adapter import attach_adapter

    return attach_adapter(model, adapter.root)


def merged_reader(adapter: Adapter, targets: Sequence[RoleTensor], read: Read) -> Read:
    """Return a reader of the base's tensors with the adapter merged: W + s B A in float64, as float32, not rounded.

    Args:
        adapter: The adapter.
        targets: The matrices that it adapts.
        read: Reads the base's tensors.
    """
    adapted = {target.stored: target for target in targets}

    def merged(name: str) -> npt.NDArray[np.floating]:
        values = read(name)
        target = adapted.get(name)
        if target is None:
            return values
        left, right = low_rank(target, *adapter.read(target.module), adapter.scale(target.module))
        return (values.astype(np.float64) + left @ right).astype(np.float32)

    return merged


def merged_model(model: PreTrainedModel, targets: Sequence[RoleTensor], read: Read) -> PreTrainedModel:
    """Return the base in memory with the adapter merged, rounded to the compute dtype."""
    import torch

    from llmsurgery.compute.view import weight_view

    with torch.no_grad():
        for target in targets:
            view = weight_view(model, target)
            view.copy_(torch.from_numpy(read(target.stored)).to(view.device, view.dtype))
    return model


def adapter_record(prepared: Prepared) -> dict[str, object]:
    """Return what the adapter is: path and digests."""
    assert prepared.adapter is not None
    root = prepared.adapter.root
    digests = {name: file_digest(root / name) for name in (CONFIG, WEIGHTS)}
    return {"path": str(root) if prepared.request.model is not None else "demo", "sha256": digests}
