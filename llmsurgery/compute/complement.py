"""How likely anything but the label is, without a [batch, time, vocabulary] tensor."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from llmsurgery.compute.head import Head, chunk_rows


def complement_log_probabilities(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p(label) and log(1 - p(label)) per position.

    The second is logsumexp(logits without the label) - logsumexp(logits): of a label whose probability rounds to 1 it
    is still finite, and so is its slope.

    Args:
        hidden: Final hidden states of the positions that predict the labels [positions, width].
        head: The language-model head.
        labels: Token ids [positions].

    Returns:
        Two values per position [positions], fp32, in nats. The backward recomputes the logits chunk by chunk.
    """

    def chunk(current: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head.to(current.dtype).logits(current).float()
        log_sums = logits.logsumexp(-1)
        own = logits.gather(1, wanted[:, None]).squeeze(1)
        others = logits.scatter(1, wanted[:, None], -torch.inf).logsumexp(-1)
        return torch.stack((own - log_sums, others - log_sums))

    rows = chunk_rows(head.weight)
    pairs = zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    log_p, log_rest = torch.cat([checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs], dim=1)
    return log_p, log_rest
