"""Prompts with interchangeable segments: where a segment lies depends on who looks, not on the order of the listing.

Paper: PINE, "Eliminating Position Bias of Language Models: A Mechanistic Approach", arXiv 2407.01100 (ICLR 2025).

A prompt is a prefix of p tokens, k segments of L_1 ... L_k tokens (L in all) and a suffix. Every segment has the base
position of the last one: token u of segment j stands at p + L - L_j + u. A query sees segment j further back by

    shift_j = sum of the lengths of the segments that are more important to it

where a token of segment i finds its own segment the most important, and ranks the others by

    imp(i, j) = sum over t in i of mean over u in j of a(t, u)

with a the softmax of unrotated attention logits over the tokens of all segments but i; a token t of the suffix ranks by
mean over u in j of a(t, u), over all segments. Nothing here knows the order in which the segments are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from llmsurgery.errors import InputError


@dataclass(frozen=True)
class Segments:
    """A prompt as prefix, interchangeable segments and suffix, each as token ids.

    Attributes:
        prefix: Tokens before the segments, at least one: the first token of a text draws much attention.
        parts: Tokens of each segment.
        suffix: Tokens behind them.
        own_counts: Let the softmax of importances run over a token's own segment too, as the paper's formula has it;
            its released code leaves the own segment out.
    """

    prefix: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    suffix: tuple[int, ...] = ()
    own_counts: bool = False

    def __post_init__(self) -> None:
        """Check the pieces."""
        if not self.prefix:
            raise InputError("the prefix has no token", "segments need something before them", "add an instruction")
        if not self.parts or not all(self.parts):
            raise InputError("a segment has no token", "nothing can be listed without one", "leave empty segments out")

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """All token ids in the order of the listing."""
        return (*self.prefix, *(token for part in self.parts for token in part), *self.suffix)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(len(part) for part in self.parts)

    @property
    def start(self) -> int:
        """Index of the first token of the first segment."""
        return len(self.prefix)

    @property
    def stop(self) -> int:
        """Index behind the last token of the last segment."""
        return self.start + sum(self.lengths)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """Indices of the tokens of each segment."""
        found, start = [], self.start
        for length in self.lengths:
            found.append(slice(start, start + length))
            start += length
        return tuple(found)

    @cached_property
    def bases(self) -> tuple[int, ...]:
        """Base position of the first token of each segment."""
        return tuple(self.stop - length for length in self.lengths)

    @cached_property
    def ties(self) -> tuple[int, ...]:
        """Segments in an order of their own, by which ties are broken: not the order of the listing."""
        return tuple(sorted(range(len(self.parts)), key=lambda number: self.parts[number]))

    def owners(self, count: int) -> torch.Tensor:
        """Return the segment of each of the first tokens [count]; -1 before the segments, k behind them."""
        owners = torch.full((count,), len(self.parts))
        owners[: self.start] = -1
        for number, span in enumerate(self.spans):
            owners[span] = number
        return owners

    def base_positions(self, count: int) -> torch.Tensor:
        """Return the base positions of the first tokens [count]; behind the segments they are the indices."""
        positions = torch.arange(count)
        for span, base in zip(self.spans, self.bases, strict=True):
            positions[span] += base - span.start
        return positions

    def reordered(self, order: Sequence[int]) -> Segments:
        """Return the same prompt with its segments listed in another order."""
        return Segments(self.prefix, tuple(self.parts[number] for number in order), self.suffix, self.own_counts)


def shifts(importance: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Return how much further back than its base each segment is seen.

    Args:
        importance: Importance of each segment to each query [..., segments].
        segments: The prompt.

    Returns:
        Positions [..., segments], int64: the lengths of the more important segments.
    """
    ties = torch.tensor(segments.ties, device=importance.device)
    lengths = torch.tensor(segments.lengths, device=importance.device)
    ranked = ties[importance[..., ties].sort(dim=-1, descending=True, stable=True).indices]
    before = lengths[ranked].cumsum(-1) - lengths[ranked]
    return torch.empty_like(before).scatter_(-1, ranked, before)


def importances(logits: torch.Tensor, owners: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Return how important each segment is to each query.

    Args:
        logits: Unrotated attention logits of the segments' tokens [heads, queries, L], fp32.
        owners: Segment of each query [queries], as `Segments.owners` has it.
        segments: The prompt.

    Returns:
        Importances [heads, queries, segments], fp32; infinite for a query's own segment.
    """
    count = len(segments.parts)
    key_owners = segments.owners(segments.stop)[segments.start :].to(logits.device)
    own = owners[:, None] == torch.arange(count, device=owners.device)
    # With a single segment a query in it has nothing else to look at, and nothing to rank.
    if not segments.own_counts and count > 1:
        logits = logits.masked_fill(owners[:, None] == key_owners, -torch.inf)
    attention = logits.softmax(-1)
    parts = torch.split(attention, list(segments.lengths), -1)
    means = torch.stack([part.sum(-1) / part.shape[-1] for part in parts], -1)
    for number in range(count):
        inside = owners == number
        if bool(inside.any()):
            means[:, inside] = means[:, inside].sum(1, keepdim=True)
    return means.masked_fill(own, torch.inf)
