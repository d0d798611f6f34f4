"""Distance of a model's distributions from the uniform one, without a [batch, time, vocabulary] tensor."""

from __future__ import annotations

import math

import torch

from llmsurgery.compute.head import Head
from llmsurgery.compute.positions import per_position


def uniform_divergence(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return KL(uniform || model) per position, differentiable in the hidden states and the head.

    It is logsumexp(z) - mean(z) - log V for logits z, so that neither a softmax nor its logarithm is ever stored.

    Args:
        hidden: Final hidden states [positions, width].
        head: The language-model head.

    Returns:
        One value per position [positions], fp32, in nats.
    """
    size = head.weight.shape[0]
    head = head.to(hidden.dtype)

    def chunk(states: torch.Tensor) -> torch.Tensor:
        logits = head.logits(states).float()
        return torch.logsumexp(logits, dim=-1) - logits.mean(-1) - math.log(size)

    return per_position(chunk, head, hidden)


def missing_entropy(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return KL(model || uniform) = log V - H(model) per position; arguments and result as `uniform_divergence`."""

    def chunk(states: torch.Tensor) -> torch.Tensor:
        log_p = head.to(states.dtype).logits(states).float().log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1) + math.log(log_p.shape[-1])

    return per_position(chunk, head, hidden)
