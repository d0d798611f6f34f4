"""KL divergence to cached distributions, without a [batch, time, vocabulary] tensor.

A model's distribution at a position is its final hidden state and its head. Keeping the hidden states of the answers
to be protected costs a few megabytes, and no second model or second forward is needed during training.
"""

from __future__ import annotations

import torch

from llmsurgery.compute.head import Head
from llmsurgery.compute.positions import per_position


def divergence(
    hidden: torch.Tensor, head: Head, reference: torch.Tensor, reference_head: Head, reverse: bool = False
) -> torch.Tensor:
    """Return KL(reference || model) per position, differentiable in the model's hidden states and head.

    Args:
        hidden: The model's final hidden states [positions, width].
        head: The model's head.
        reference: Cached final hidden states of the reference [positions, width].
        reference_head: The reference's head.
        reverse: Return KL(model || reference) instead.

    Returns:
        One value per position [positions], fp32, in nats.
    """

    def chunk(current: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        log_q = head.to(current.dtype).logits(current).float().log_softmax(-1)
        log_p = reference_head.logits(kept).float().log_softmax(-1)
        if reverse:
            log_p, log_q = log_q, log_p
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return per_position(chunk, head, hidden, reference)


def lowered_cross_entropy(
    hidden: torch.Tensor,
    head: Head,
    reference: torch.Tensor,
    reference_head: Head,
    labels: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Return the cross-entropy to the reference's distribution with the label's logit lowered by beta.

    Args:
        hidden: The model's final hidden states [positions, width].
        head: The model's head.
        reference: Final hidden states of the reference [positions, width].
        reference_head: The reference's head.
        labels: Token ids [positions].
        beta: What is taken off the label's logit.

    Returns:
        -sum_v q(v) log p(v) per position [positions], fp32, in nats.
    """

    def chunk(current: torch.Tensor, kept: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        lowered = reference_head.logits(kept).float()
        lowered = lowered.scatter_add(1, wanted[:, None], lowered.new_full((len(wanted), 1), -beta))
        return -(lowered.softmax(-1) * head.to(current.dtype).logits(current).float().log_softmax(-1)).sum(-1)

    return per_position(chunk, head, hidden, reference, labels)
