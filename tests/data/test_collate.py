"""Batches: padding, masks and length buckets."""

from __future__ import annotations

import pytest
import torch

from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import collate, length_buckets

ROWS = [
    Encoded((5, 6, 7, 257), 2, True),
    Encoded((8, 9), 1, False),
    Encoded((1, 2, 3), 0, False),
]


def test_rows_are_padded_on_the_right_and_masked() -> None:
    batch = collate(ROWS, 256, torch.device("cpu"), [4, 2, 0])
    assert batch.input_ids.tolist() == [[5, 6, 7, 257], [8, 9, 256, 256], [1, 2, 3, 256]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    # The first token of a row is never a label, even where the answer begins with it.
    assert batch.label_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert batch.end_mask.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.indices == (4, 2, 0)
    assert batch.label_mask.dtype == torch.bool


def test_padding_with_the_end_token_masks_only_the_padding() -> None:
    batch = collate(ROWS[:2], 257, torch.device("cpu"))
    assert batch.attention_mask.sum(1).tolist() == [4, 2]
    assert batch.label_mask.sum(1).tolist() == [2, 1]
    assert batch.end_mask.sum().item() == 1


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_buckets_cover_every_row_once_longest_first(batch_size: int) -> None:
    lengths = [3, 9, 1, 9, 4, 4, 7, 2, 5, 6]
    rows = [Encoded(tuple(range(length)), 0, False) for length in lengths]
    buckets = list(length_buckets(rows, batch_size))
    flat = [index for bucket in buckets for index in bucket]
    assert sorted(flat) == list(range(len(rows)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert all(len(bucket) == batch_size for bucket in buckets[:-1])
    assert list(length_buckets([], batch_size)) == []
