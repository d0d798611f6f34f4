"""The smallest scores of a matrix as a mask, on CPUs by selection and not by sorting, always exactly as many as asked.

Stored weights have many ties: "score <= k-th smallest", as several published codes compare, takes all of them. Here
exactly k entries are taken, the first by index among equals.
"""

from __future__ import annotations

import torch


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the smallest entries of every row.

    Args:
        scores: Scores [rows, entries], finite.
        count: Entries to mark in each row, 0 to all.

    Returns:
        Bool [rows, entries], True at exactly `count` entries of each row; among equals the first by index.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.device.type == "cuda":
        # There a row is selected from by one block of threads: a whole matrix in one row takes a hundred times longer.
        bound = scores.sort(dim=1).values[:, count - 1 : count]
    else:
        bound = torch.kthvalue(scores, count, dim=1, keepdim=True).values
    below = scores < bound
    equal = scores == bound
    missing = count - below.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) == missing).all()):
        return below | equal
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))


def smallest_of_all(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` smallest entries of a whole matrix [rows, columns]; ties go by flat index."""
    return smallest(scores.reshape(1, -1), count).reshape(scores.shape)


def smallest_of_groups(scores: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Mark the `count` smallest of every `size` consecutive entries of each row.

    Args:
        scores: Scores [rows, entries]; `size` divides the entries.
        count: Entries to mark in each group.
        size: Entries of a group.
    """
    return smallest(scores.reshape(-1, size), count).reshape(scores.shape)


def smallest_share(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the floor(share * entries) smallest entries of every row."""
    return smallest(scores, share_of(share, scores.shape[1]))


def share_of(share: float, entries: int) -> int:
    """Return floor(share * entries), where 0.3 of 10 is 3 although the product in binary is a little less."""
    return int(share * entries + 1e-9)
