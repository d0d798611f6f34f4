"""Slopes that are computed along with the values, against those of the same function without chunks."""

from __future__ import annotations

import pytest
import torch

from llmsurgery.compute import head as head_module
from llmsurgery.compute.divergence import divergence, lowered_cross_entropy
from llmsurgery.compute.head import Head, label_log_probabilities, module_head
from llmsurgery.compute.positions import per_position


class Curved(torch.nn.Module):
    """A head that is more than a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(9, 5))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.weight.T).tanh()


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("elements", [2**23, 2 * 9])
def test_values_and_slopes_are_those_of_the_function(
    moves: bool, curved: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", elements)
    layer = Curved().requires_grad_(moves)
    head = module_head(layer) if curved else Head(layer.weight, softcap=2.0)
    hidden, weights = torch.randn(7, 5, requires_grad=True), torch.rand(7)

    def chunk(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * head.logits(states).logsumexp(-1).square()

    wanted = [hidden, layer.weight] if moves else [hidden]
    values = per_position(chunk, head, hidden, weights)
    expected = chunk(hidden, weights)
    torch.testing.assert_close(values, expected)
    incoming = torch.randn(7)
    found = torch.autograd.grad(values, wanted, incoming)
    for one, two in zip(found, torch.autograd.grad(expected, wanted, incoming), strict=True):
        torch.testing.assert_close(one, two)


def test_the_head_runs_once_where_it_stands_still() -> None:
    calls = []

    class Counted(Curved):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            calls.append(len(hidden))
            return super().forward(hidden)

    for moves, expected in ((False, [3]), (True, [3, 3])):
        head = module_head(Counted().requires_grad_(moves))
        hidden = torch.randn(3, 5, requires_grad=True)
        calls.clear()
        per_position(lambda states, head=head: head.logits(states).sum(-1), head, hidden).sum().backward()
        assert calls == expected


def test_without_gradients_there_are_none() -> None:
    head = Head(torch.randn(9, 5))
    with torch.no_grad():
        values = per_position(lambda states: head.logits(states).sum(-1), head, torch.randn(3, 5, requires_grad=True))
    assert not values.requires_grad
    assert not per_position(lambda states: head.logits(states).sum(-1), head, torch.randn(3, 5)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_gives_the_slopes_of_a_moving_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    labels, incoming = torch.randint(40, (6,)), 1e-3 * torch.randn(6)
    base, reference, weight = torch.randn(6, 8), torch.randn(6, 8), torch.randn(40, 8)
    losses = {
        "label": lambda hidden, head: label_log_probabilities(hidden, head, labels),
        "divergence": lambda hidden, head: divergence(hidden, head, reference, Head(weight)),
        "lowered": lambda hidden, head: lowered_cross_entropy(hidden, head, reference, Head(weight), labels, 3.0),
    }
    for name, loss in losses.items():
        slopes = []
        for moves in (False, True):
            hidden = base.to(dtype).requires_grad_()
            head = Head(weight.clone().to(dtype).requires_grad_(moves), softcap=3.0)
            (slope,) = torch.autograd.grad(loss(hidden, head), hidden, incoming)
            slopes.append(slope.float())
        tolerance = 1e-6 if dtype == torch.float32 else 2e-5
        assert torch.allclose(*slopes, atol=tolerance), name


def test_no_position_has_no_value() -> None:
    head = Head(torch.randn(9, 5))
    hidden = torch.zeros(0, 5, requires_grad=True)
    assert per_position(lambda states: head.logits(states).sum(-1), head, hidden).shape == (0,)
