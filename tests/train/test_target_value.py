"""Values found by descent: what is minimised against a plain reference in every family, bounds and stop rules."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.head import Head
from llmsurgery.compute.load import load_model
from llmsurgery.compute.uniform import missing_entropy
from llmsurgery.errors import DivergedError, UnsupportedError, UsageError
from llmsurgery.train.target_value import ValueContext, optimise_value, site_module
from llmsurgery.train.value_config import ValueConfig

from ..builders import BUILDERS

PAD = 256
CONTEXTS = [
    ValueContext((5, 9, 30, 77, 12), 2, 3),
    ValueContext((8, 8, 41, 5, 9, 30, 77, 12), 5, 6),
    ValueContext((60, 5, 9, 30), 3, 4),
]
KEPT = ValueContext((5, 9, 30, 61, 62), 2, 5)
FEW = ValueConfig(value_steps=3, value_lr=0.1)


def opened(root: Path) -> tuple[PreTrainedModel, Structure]:
    checkpoint = Checkpoint.open(root)
    return load_model(root, torch.float32, torch.device("cpu")), detect(checkpoint.config, checkpoint.tensors)


@torch.no_grad()
def logits(model: PreTrainedModel, path: str, context: ValueContext, delta: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [time, vocabulary] of one row on its own, with delta added by a plain hook."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[0, context.position] += delta
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = model.get_submodule(path).register_forward_hook(hook)
    found: torch.Tensor = model(input_ids=torch.tensor([context.ids])).logits[0].double().log_softmax(-1)
    handle.remove()
    return found


def plain_loss(model: PreTrainedModel, path: str, delta: torch.Tensor, config: ValueConfig, length: float) -> float:
    terms = []
    for context in CONTEXTS[:2]:
        scores = logits(model, path, context, delta)
        labels = context.ids[context.start :]
        terms.append(-sum(float(scores[context.start - 1 + i, token]) for i, token in enumerate(labels)) / len(labels))
    before, after = (logits(model, path, KEPT, change)[KEPT.position] for change in (torch.zeros_like(delta), delta))
    kl = float((before.exp() * (before - after)).sum())
    return sum(terms) / 2 + config.value_kl * kl + config.value_decay * float(delta.norm()) / length**2


def value_before(model: PreTrainedModel, path: str, context: ValueContext = CONTEXTS[0]) -> torch.Tensor:
    caught = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _module, _inputs, output: caught.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([context.ids]))
    handle.remove()
    return caught[0][0, context.position]


@pytest.mark.parametrize("family", BUILDERS)
def test_the_loss_is_that_of_a_plain_forward(family: str, checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints[family])
    dense = {tensor.layer for tensor in structure.tensors if tensor.role == "mlp.down"}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.get_input_embeddings().weight.requires_grad_(True)
    for site in ("mlp", "block"):
        if site == "mlp" and 1 not in dense:
            with pytest.raises(UnsupportedError, match="no single memory"):
                optimise_value(model, structure, site, 1, CONTEXTS, FEW, PAD)
            continue
        path = site_module(structure, site, 1)
        start = value_before(model, path)
        value, record = optimise_value(model, structure, site, 1, CONTEXTS[:2], FEW, PAD, KEPT)
        loss: Any = record["loss"]
        length = float(start.norm())
        assert loss["first"] == pytest.approx(plain_loss(model, path, torch.zeros_like(start), FEW, length), abs=1e-4)
        assert loss["last"] == pytest.approx(plain_loss(model, path, value - start, FEW, length), abs=1e-4)
        assert loss["last"] < loss["first"]
        # One context at a time, with its own padding, is the same search.
        again, _ = optimise_value(model, structure, site, 1, CONTEXTS[:2], FEW, PAD, KEPT, batch_rows=1)
        assert torch.allclose(value, again, atol=1e-4)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert model.get_input_embeddings().weight.requires_grad
    assert model.get_input_embeddings().weight.grad is None


def test_a_change_stays_within_its_bound_and_ends_when_said(checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints["gpt2"])
    start = value_before(model, site_module(structure, "mlp", 0))
    rows = CONTEXTS[:2]
    narrow = replace(FEW, value_steps=10, value_lr=0.5, value_clamp=0.25)
    value, record = optimise_value(model, structure, "mlp", 0, rows, narrow, PAD)
    assert float((value - start).norm()) <= 0.25 * float(start.norm()) * (1 + 1e-5)
    assert (record["steps"], record["stopped"], record["kl"]) == (10, "steps", None)
    # One answer token after the lookup token, and no bound that matters: the search ends early.
    wide = ValueConfig(value_steps=60, value_clamp=100.0, value_decay=0.0, value_tolerance=1.0)
    rows = [ValueContext((9, 30, 77, 12), 2, 3), ValueContext((41, 5, 9, 30, 77, 12), 4, 5)]
    path = site_module(structure, "block", 1)
    start = value_before(model, path, rows[0])
    value, record = optimise_value(model, structure, "block", 1, rows, wide, PAD)
    loss: Any = record["loss"]
    assert record["stopped"] == "tolerance"
    assert int(str(record["steps"])) < 60
    assert loss["last"] < 1.0 < loss["first"]
    for context in rows:
        scores = logits(model, path, context, value - start)
        assert scores[context.start - 1].argmax() == context.ids[-1]


def test_the_entropy_of_an_answer_can_be_raised(checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints["sharded_llama"])
    head = model.get_output_embeddings()
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Categorical(logits=head(states)).entropy()
    gap = missing_entropy(states, Head(head.weight))
    assert torch.allclose(gap, math.log(262) - expected, atol=1e-5)
    config = ValueConfig(value_steps=60, value_lr=0.1, value_decay=0.0)
    rows = [CONTEXTS[2], replace(CONTEXTS[2], ids=(7, 60, 5, 9, 30), position=4, start=5)]
    _, record = optimise_value(model, structure, "block", 1, rows, config, PAD, objective="entropy")
    loss: Any = record["loss"]
    assert loss["last"] < 0.6 * loss["first"]


def test_what_is_not_known_or_not_finite_is_refused(checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints["tied_llama"])
    with pytest.raises(UsageError, match="site"):
        optimise_value(model, structure, "attention", 0, CONTEXTS, FEW, PAD)
    with pytest.raises(UsageError, match="objective"):
        optimise_value(model, structure, "mlp", 0, CONTEXTS, FEW, PAD, objective="silence")
    with pytest.raises(UsageError, match="layer 9"):
        optimise_value(model, structure, "mlp", 9, CONTEXTS, FEW, PAD)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(DivergedError, match="step 0"):
        optimise_value(model, structure, "mlp", 0, CONTEXTS[:2], FEW, PAD)
