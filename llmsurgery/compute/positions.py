"""Functions of single positions through a language-model head, a chunk of logits at a time.

A value that depends on one position's hidden state alone has a gradient of the size of that state, whatever the
vocabulary: dL/dh = dL/dv * dv/dh. So where nothing but the hidden states needs a gradient, as under adapters, dv/dh is
computed along with v, and the backward is one product with it: the logits are computed once, and none are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llmsurgery.compute.head import Head, ModuleHead, chunk_rows

Chunk = Callable[..., torch.Tensor]
"""Takes hidden states [positions, width] and parts of further tensors, returns one value per position [positions]."""


def head_moves(head: Head) -> bool:
    """Whether the head itself needs a gradient."""
    parameters = [head.weight, head.bias]
    if isinstance(head, ModuleHead) and head.layer is not None:
        parameters += head.layer.parameters()
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


class _Forward(torch.autograd.Function):
    """Values with their slopes in the hidden states; the further tensors need no gradient."""

    @staticmethod
    def forward(context: Any, chunk: Chunk, rows: int, hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        slopes = torch.empty_like(hidden)
        values = []
        for start in range(0, max(1, len(hidden)), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                states = hidden[part].detach().requires_grad_()
                value = chunk(states, *(other[part] for other in others))
                (slopes[part],) = torch.autograd.grad(value.sum(), states)
            values.append(value.detach())
        context.save_for_backward(slopes)
        return torch.cat(values)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = context.saved_tensors
        scaled = (gradient[:, None] * slopes).to(slopes.dtype)
        return None, None, scaled, *(None for _ in context.needs_input_grad[3:])


def per_position(chunk: Chunk, head: Head, hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Apply a function of single positions to many of them, some at a time.

    Args:
        chunk: The function; it may use the head, whose gradient it then gives as well.
        head: The head that may be in training; its vocabulary decides how many positions go through at once.
        hidden: Hidden states [positions, width].
        others: Further tensors [positions, ...] without a gradient, cut alike.

    Returns:
        One value per position [positions], differentiable once. At no time are the logits of more than one chunk held:
        where the head moves, the backward computes them again.
    """
    rows = chunk_rows(head.weight)
    if torch.is_grad_enabled() and hidden.requires_grad and not head_moves(head):
        apply: Any = _Forward.apply
        result: torch.Tensor = apply(chunk, rows, hidden, *others)
        return result
    parts = zip(*(torch.split(each, rows) for each in (hidden, *others)), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk(*part) for part in parts])
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])
