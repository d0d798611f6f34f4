"""The inverted hinge loss of labels, without a [batch, time, vocabulary] tensor."""

from __future__ import annotations

import torch

from llmsurgery.compute.head import Head
from llmsurgery.compute.positions import per_position


def inverted_hinge(hidden: torch.Tensor, head: Head, labels: torch.Tensor, margin: float = 1.0) -> torch.Tensor:
    """Return max(0, margin + p(label) - max over other tokens v of p(v)) per position.

    Args:
        hidden: Final hidden states of the positions that predict the labels [positions, width].
        head: The language-model head.
        labels: Token ids [positions].
        margin: The margin; from 1 up the maximum with 0 never acts.

    Returns:
        One loss per position [positions], fp32. Of the vocabulary only the label's logit, the best other one and the
        log-sum-exp are needed.
    """

    def chunk(current: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head.to(current.dtype).logits(current).float()
        log_sums = logits.logsumexp(-1)
        own = logits.gather(1, wanted[:, None]).squeeze(1)
        other = logits.scatter(1, wanted[:, None], -torch.inf).max(-1).values
        return (margin + (own - log_sums).exp() - (other - log_sums).exp()).clamp(min=0)

    return per_position(chunk, head, hidden, labels)
