"""From scores per token to scores per answer."""

from __future__ import annotations

import torch


def row_sums(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Sum values per row.

    Args:
        values: One value per labelled token [tokens].
        rows: Row number of each [tokens].
        count: Number of rows.

    Returns:
        Sums [count], fp32.
    """
    # A product with the membership matrix adds in one fixed order on every device; index_add does not on CUDA.
    members = rows[None, :] == torch.arange(count, device=rows.device)[:, None]
    return members.float() @ values.float()


def row_means(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Average values per row [count]; every row has at least one token."""
    return row_sums(values, rows, count) / row_sums(torch.ones_like(values), rows, count)
