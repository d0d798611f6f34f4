"""Batches: right padding, masks, and length buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.data.chat import Encoded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Attributes:
        input_ids: Token ids [batch, time], right-padded.
        attention_mask: 1 for tokens, 0 for padding [batch, time].
        label_mask: True for answer tokens and the end token [batch, time].
        end_mask: True for the end token alone [batch, time].
        indices: Position of each row in the sequence the batch was cut from.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    label_mask: torch.Tensor
    end_mask: torch.Tensor
    indices: tuple[int, ...]


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device, indices: Sequence[int] = ()) -> Batch:
    """Pad rows on the right to the longest of them.

    Args:
        rows: Encoded rows.
        pad_id: Token id for padding; it is masked everywhere.
        device: Where the tensors go.
        indices: Carried along in the batch.
    """
    import torch

    time = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), time), pad_id, dtype=torch.long)
    attention = torch.zeros_like(input_ids)
    labels = torch.zeros_like(input_ids, dtype=torch.bool)
    ends = torch.zeros_like(labels)
    for i, row in enumerate(rows):
        length = len(row.ids)
        input_ids[i, :length] = torch.tensor(row.ids)
        attention[i, :length] = 1
        # Nothing predicts the first token of a sequence.
        labels[i, max(1, row.answer_start) : length] = True
        ends[i, length - 1] = row.ends
    return Batch(input_ids.to(device), attention.to(device), labels.to(device), ends.to(device), tuple(indices))


def length_buckets(rows: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of rows of similar length, longest first so that memory peaks early."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
