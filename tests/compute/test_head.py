"""Chunked token log-probabilities against plain log-softmax: values, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from llmsurgery.compute import head
from llmsurgery.compute.head import Head, batch_log_probabilities, label_log_probabilities, mean_kl

POSITIONS, WIDTH, VOCABULARY = 23, 8, 31


def inputs(with_bias: bool, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Hidden, weight and perhaps bias; labels; weights of the positions in a loss."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(POSITIONS, WIDTH, generator=draw), torch.randn(VOCABULARY, WIDTH, generator=draw)]
    if with_bias:
        tensors.append(torch.randn(VOCABULARY, generator=draw))
    labels = torch.randint(VOCABULARY, (POSITIONS,), generator=draw)
    return tensors, labels, torch.randn(POSITIONS, generator=draw)


def plain(tensors: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(*tensors)
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def chunked(tensors: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    hidden, weight, *bias = tensors
    return label_log_probabilities(hidden, Head(weight, bias[0] if bias else None), labels)


# One position a chunk, chunks that do not divide the positions, one chunk for all.
@pytest.mark.parametrize("rows", [1, 5, POSITIONS, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_log_softmax(with_bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows * VOCABULARY)
    tensors, labels, weights = inputs(with_bias)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    values, expected = chunked(ours, labels), plain(exact, labels)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=2e-6, rtol=1e-6)
    # A loss that is not linear in the log-probabilities.
    (values.exp() * weights).sum().backward()
    (expected.exp() * weights.double()).sum().backward()
    for mine, reference in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_needs_a_gradient_gets_one(trained: int) -> None:
    tensors, labels, _ = inputs(with_bias=True)
    tensors[trained].requires_grad_()
    chunked(tensors, labels).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [number == trained for number in range(3)]
    alone = tensors[trained].grad
    together = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    chunked(together, labels).sum().backward()
    assert torch.equal(alone, together[trained].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    tensors, labels, _ = inputs(with_bias=False)
    tensors[0] *= scale / (tensors[0] @ tensors[1].T).abs().max()
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    values = chunked(ours, labels)
    values.sum().backward()
    expected = plain([tensor.double() for tensor in tensors], labels)
    # fp32 holds numbers near 1e4 to 1e-3.
    torch.testing.assert_close(values.detach().double(), expected, atol=scale * 1e-6, rtol=1e-6)
    assert (values <= 0).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in ours)  # type: ignore[arg-type]


def test_adding_a_constant_to_all_logits_changes_nothing() -> None:
    tensors, labels, _ = inputs(with_bias=True)
    before = chunked(tensors, labels)
    tensors[2] = tensors[2] + 50
    torch.testing.assert_close(chunked(tensors, labels), before, atol=2e-5, rtol=0)


def test_bias_may_be_wider_than_the_hidden_states() -> None:
    tensors, labels, _ = inputs(with_bias=True)
    wide = [tensors[0].bfloat16(), tensors[1].clone().requires_grad_(), tensors[2].clone().requires_grad_()]
    values = chunked(wide, labels)
    values.sum().backward()
    torch.testing.assert_close(values.detach(), plain(tensors, labels), atol=0.1, rtol=0.05)
    assert wide[1].grad is not None
    assert wide[1].grad.dtype == torch.float32
    assert wide[2].grad is not None


def tiny(vocabulary: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
            initializer_range=0.3,
            pad_token_id=0,
        )
    )


def test_only_labelled_tokens_are_scored_each_by_the_position_before() -> None:
    model = tiny(50, 8).eval()
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(50, (3, 9), generator=draw)
    labels = torch.zeros(3, 9, dtype=torch.bool)
    labels[0, 4:8] = labels[2, 1:] = True
    with torch.no_grad():
        values, rows = batch_log_probabilities(model, ids, torch.ones_like(ids), labels)
        logits = model(input_ids=ids).logits.log_softmax(-1)
    assert rows.tolist() == [0] * 4 + [2] * 8
    expected = [logits[row, t - 1, ids[row, t]].item() for row, t in torch.nonzero(labels).tolist()]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_logits_of_a_whole_batch_are_never_held() -> None:
    batch, time, vocabulary = 2, 64, 70_000
    assert batch * time * vocabulary > head.CHUNK_ELEMENTS
    model = tiny(vocabulary, 4)
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    ids = torch.randint(vocabulary, (batch, time), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    labels = mask.bool()
    labels[:, 0] = False
    with LargestTensor() as recorded:
        values, _ = batch_log_probabilities(model, ids, mask, labels)
        forward = recorded.operations
        values.mean().backward()
    assert recorded.operations > forward + 10, "the backward pass was not recorded"
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    # The bound itself bites: one chunk is held, and no more.
    assert head.CHUNK_ELEMENTS // 2 < recorded.elements <= head.CHUNK_ELEMENTS


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_kl_equals_a_plain_computation(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows * VOCABULARY)
    (before, *before_head), _, _ = inputs(with_bias=True)
    (after, weight), _, _ = inputs(with_bias=False, seed=1)
    result = mean_kl(before, after, Head(*before_head), Head(weight))
    p = torch.nn.functional.linear(before.double(), *(t.double() for t in before_head)).softmax(-1)
    q = torch.nn.functional.linear(after.double(), weight.double()).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    assert (result > 0).all()
    same = Head(*before_head)
    assert torch.equal(mean_kl(before, before, same, same), torch.zeros(POSITIONS))
