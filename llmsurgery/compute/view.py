"""Where a stored tensor lies in a loaded model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor


def weight_view(model: PreTrainedModel, target: RoleTensor) -> torch.Tensor:
    """Return the values of a stored tensor inside a loaded model, in the stored shape.

    Args:
        model: A model loaded from the checkpoint that the tensor is stored in.
        target: The stored tensor.

    Returns:
        The parameter or buffer, or for a routed expert a view of its slice: writing into it changes the model.
    """
    module = model.get_submodule(target.module)
    if target.fused is None:
        values: torch.Tensor = getattr(module, target.part)
        return values
    blocks: Sequence[torch.Tensor] = module.get_parameter(target.fused.parameter)[target.expert].chunk(
        target.fused.blocks
    )
    return blocks[target.fused.block]
