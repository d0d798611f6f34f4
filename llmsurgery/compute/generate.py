"""Generation for a batch of prompts, padded on the left, under one config and nothing of the checkpoint's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the checkpoint's generation_config: `generate` takes from it every field that the given one leaves open."""
    kept, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = kept


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, config: GenerationConfig
) -> list[list[int]]:
    """Continue a batch of prompts.

    Args:
        model: A causal language model in eval mode.
        prompts: Token ids of each prompt.
        pad_id: Token id for padding.
        config: How to generate.

    Returns:
        The new token ids of each prompt, padding after the end included.
    """
    time = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), time), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, time - len(ids) :] = torch.tensor(ids)
        mask[row, time - len(ids) :] = 1
    with own_generation_config(model, config):
        output: Any = model.generate(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    new: list[list[int]] = output[:, time:].tolist()
    return new
