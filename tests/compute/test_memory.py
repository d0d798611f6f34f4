"""The ledger of tensors, and tensors without data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.head import final_hidden, label_log_probabilities, read_head
from llmsurgery.compute.load import empty_model, load_model
from llmsurgery.compute.memory import Ledger, pretend
from llmsurgery.train.trainable import prepare_trainable

from ..builders import BUILDERS
from ..train.bench import Bench, config

CPU = torch.device("cpu")


def test_storages_count_once_and_as_long_as_they_live() -> None:
    with Ledger() as ledger:
        first = torch.zeros(100)
        view = first.view(10, 10)[2:]
        assert ledger.live == 400
        second = first + 1
        assert ledger.live == 800
        del first
        assert ledger.live == 800, "the view still holds it"
        del view, second
    assert (ledger.live, ledger.peak) == (0, 800)


def test_what_the_backward_needs_is_counted() -> None:
    weight = torch.zeros(8, 8, requires_grad=True)
    with Ledger() as ledger:
        loss = (torch.ones(4, 8) @ weight).exp().sum()
        # The input [4, 8] and the result of exp [4, 8] are kept, and the loss.
        assert ledger.live == 2 * 128 + 4
        loss.backward()
        del loss
    assert ledger.live == weight.numel() * 4, "the gradient"


def step(model: torch.nn.Module, ledger: Ledger) -> None:
    """One forward and backward, whose peak the ledger sees."""
    with ledger:
        ids = torch.zeros(4, 24, dtype=torch.long)
        mask = torch.ones_like(ids)
        # Padding in one row, as nearly every batch has it: the model then makes a mask of its own.
        mask[0, -3:] = 0
        hidden = final_hidden(model, ids, mask)  # type: ignore[arg-type]
        places = torch.zeros(30, dtype=torch.long)
        loss = label_log_probabilities(hidden[places, places], read_head(model), places).mean()  # type: ignore[arg-type]
        del hidden
        loss.backward()


@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    # Each family once, both ways in turn.
    [(name, number % 2 == 0) for number, name in enumerate(BUILDERS)] + [("sharded_llama", False)],
)
def test_a_step_without_data_needs_what_the_real_one_does(
    architecture: str, checkpointing: bool, checkpoints: dict[str, Path]
) -> None:
    root = checkpoints[architecture]
    checkpoint = Checkpoint.open(root)
    structure = detect(checkpoint.config, checkpoint.tensors)
    settings = config(gradient_checkpointing=checkpointing)
    targets = structure.select(("linear",))
    peaks = []
    for fake in (True, False):
        if fake:
            model = empty_model(root, torch.float32, False, structure.family.buffers)
        else:
            model = load_model(root, torch.float32, CPU, buffers=structure.family.buffers)
        with prepare_trainable(model, targets, settings, Bench(root).read):
            if fake:
                with pretend(model, CPU) as ledger:
                    weights = ledger.live
                    step(model, ledger)
            else:
                ledger, weights = Ledger(), 0
                for tensor in (*model.parameters(), *model.buffers()):
                    ledger.count(tensor)
                weights = ledger.live
                step(model, ledger)
        peaks.append((weights, ledger.peak - weights))
    (weights, traced), (real_weights, real) = peaks
    assert weights == pytest.approx(real_weights, rel=0.02)
    assert traced == pytest.approx(real, rel=0.03), (traced, real)
