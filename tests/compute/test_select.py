"""Selection takes exactly as many entries as asked, the first among equals."""

from __future__ import annotations

import pytest
import torch

from llmsurgery.compute.select import share_of, smallest, smallest_of_all, smallest_of_groups


@pytest.mark.parametrize("count", [0, 1, 7, 15, 16])
def test_rows_lose_exactly_the_smallest_and_ties_go_by_index(count: int) -> None:
    # Few values, many ties.
    scores = torch.randint(0, 4, (50, 16), generator=torch.Generator().manual_seed(0)).float()
    marked = smallest(scores, count)
    for row, found in zip(scores.tolist(), marked.tolist(), strict=True):
        wanted = sorted(range(16), key=lambda index: (row[index], index))[:count]
        assert [index for index in range(16) if found[index]] == sorted(wanted)


class OnCard(torch.Tensor):
    """Says that it is on a card, where rows are sorted."""

    device = torch.device("cuda")


@pytest.mark.parametrize("count", [0, 1, 7, 15, 16])
def test_a_card_takes_the_same(count: int) -> None:
    scores = torch.randint(0, 4, (50, 16), generator=torch.Generator().manual_seed(1)).float()
    assert smallest(scores.as_subclass(OnCard), count).tolist() == smallest(scores, count).tolist()


def test_whole_matrix_and_groups() -> None:
    scores = torch.tensor([[4.0, 1.0, 0.5, 2.0], [1.0, 3.0, 0.1, 2.0]])
    assert smallest_of_all(scores, 4).tolist() == [[False, True, True, False], [True, False, True, False]]
    assert smallest_of_groups(scores, 1, 2).tolist() == [[False, True, True, False], [True, False, True, False]]


def test_a_share_is_rounded_down_but_not_below_a_whole_number() -> None:
    assert [share_of(0.3, 10), share_of(0.5, 7), share_of(0.1, 30), share_of(0.999, 10)] == [3, 3, 3, 9]
