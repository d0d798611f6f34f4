"""Prompts as one batch; those with a common beginning, as a chat template gives, run that beginning once.

Packed prompts are one row: the common tokens, then what each has of its own. A mask lets a token see the common ones
and those of its own prompt before it, and positions go on from the common part in each, so that every token computes
what it would in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import PreTrainedModel

WORTH = 0.25
"""Share of all tokens that packing must save; a mask of one's own costs some speed in attention."""


@dataclass(frozen=True)
class Batch:
    """Arguments of one forward, and where its prompts lie in it.

    Attributes:
        inputs: Keyword arguments of the model without its head.
        rows: Row of each prompt.
        positions: Index in the row of the token that is looked at, of each prompt.
        ends: Index in the row of the last token of each prompt.
    """

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor


def make_batch(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], positions: Sequence[int], pad_id: int
) -> Batch:
    """Return prompts as one batch, packed if that saves much and the model's code is known to take it.

    Args:
        model: A causal language model.
        prompts: Token ids.
        positions: Index of the token of each prompt that is looked at.
        pad_id: Token id for padding, on the right.
    """
    shared = common_length(prompts)
    saved = shared * (len(prompts) - 1)
    if saved >= WORTH * sum(map(len, prompts)) and _takes_masks(model, max(map(len, prompts))):
        return _packed(model, prompts, positions, shared)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), pad_id, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    device = model.device
    return Batch(
        {"input_ids": ids.to(device), "attention_mask": mask.to(device)},
        torch.arange(len(prompts), device=device),
        torch.tensor(positions, device=device),
        (lengths - 1).to(device),
    )


def common_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many first tokens all prompts share; at least one is left to each."""
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    return min(length, min(map(len, prompts)) - 1)


def _takes_masks(model: PreTrainedModel, longest: int) -> bool:
    """Whether attention takes a mask as it is, and no window cuts it."""
    config = model.config.get_text_config()
    # Some configs say 0 for none.
    window = getattr(config, "sliding_window", None)
    return (
        type(model).__module__.startswith("transformers.")
        and config._attn_implementation in ("sdpa", "eager")
        and (not window or longest <= window)
    )


def _packed(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], spots: Sequence[int], shared: int) -> Batch:
    ids, positions, owner = list(prompts[0][:shared]), list(range(shared)), [-1] * shared
    starts = []
    for number, prompt in enumerate(prompts):
        # Where the prompt's first token would stand if it had the common part to itself.
        starts.append(len(ids) - shared)
        ids += prompt[shared:]
        positions += range(shared, len(prompt))
        owner += [number] * (len(prompt) - shared)
    of, device = torch.tensor(owner), model.device
    seen = ((of[None, :] == of[:, None]) | (of[None, :] < 0)).tril()
    mask = torch.zeros(len(ids), len(ids), dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    at = [spot if spot < shared else start + spot for start, spot in zip(starts, spots, strict=True)]
    ends = [start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=True)]
    return Batch(
        {
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": torch.tensor([positions], device=device),
            "attention_mask": mask[None, None].to(device),
        },
        torch.zeros(len(prompts), dtype=torch.long, device=device),
        torch.tensor(at, device=device),
        torch.tensor(ends, device=device),
    )
