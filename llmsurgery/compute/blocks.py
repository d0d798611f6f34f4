"""The residual stream after a block, computed no further than that block, or no further back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.head import backbone


def blocks_path(structure: Structure) -> str:
    """Return the module path of the list of blocks, for example "model.layers"."""
    return next(path for path in structure.family.roles.values() if "{layer}" in path).partition(".{layer}")[0]


@contextmanager
def first_blocks(model: PreTrainedModel, structure: Structure, count: int) -> Iterator[None]:
    """Let the model have its first `count` blocks alone, for the length of a `with` block."""
    path = blocks_path(structure)
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    whole = model.get_submodule(path)
    assert isinstance(whole, torch.nn.ModuleList)
    setattr(parent, name, whole[:count])
    try:
        yield
    finally:
        setattr(parent, name, whole)


def residual_after(
    model: PreTrainedModel,
    structure: Structure,
    block: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    autocast: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the residual stream after a block; later blocks and the head are not run.

    Args:
        model: A causal language model.
        structure: Its roles.
        block: Number of the block.
        input_ids: Token ids [batch, time].
        attention_mask: 1 for tokens, 0 for padding [batch, time].
        autocast: Dtype of matrix products if trained weights are wider than the compute dtype, else None.

    Returns:
        Hidden states [batch, time, width] in the compute dtype, before the final norm.
    """
    caught: list[torch.Tensor] = []

    def catch(_norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught.append(inputs[0])

    # What the final norm reads is what the last block wrote, whatever blocks return in this family.
    handle = model.get_submodule(structure.family.roles["norm.final"]).register_forward_pre_hook(catch)
    try:
        with (
            first_blocks(model, structure, block + 1),
            torch.autocast(input_ids.device.type, dtype=autocast, enabled=autocast is not None),
        ):
            backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


class _Skipped(torch.nn.Module):
    """Stands for a block that need not run again, and shows its attributes to the model around it."""

    def __init__(self, block: torch.nn.Module, result: torch.Tensor) -> None:
        super().__init__()
        # Not as a submodule: the block keeps its one place in the model.
        self.__dict__["block"], self.__dict__["result"] = block, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *_arguments: object, **_keywords: object) -> torch.Tensor:
        result: torch.Tensor = self.__dict__["result"]
        return result


@contextmanager
def skipped_blocks(model: PreTrainedModel, path: str, count: int, entering: torch.Tensor) -> Iterator[None]:
    """Let the first blocks return what enters the block after them, instead of running once more.

    Args:
        model: A causal language model.
        path: Path of the list of its blocks.
        count: How many blocks are skipped.
        entering: The residual stream that enters block `count` [batch, time, width].
    """
    parent_path, _, name = path.rpartition(".")
    parent, whole = model.get_submodule(parent_path), model.get_submodule(path)
    assert isinstance(whole, torch.nn.ModuleList)
    stand_ins = [_Skipped(block, entering) for block in whole[:count]]
    setattr(parent, name, torch.nn.ModuleList([*stand_ins, *whole[count:]]))
    try:
        yield
    finally:
        setattr(parent, name, whole)
