"""The residual stream in every family: what norm and head make of it, and changes that reach the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.residual import Lens, changed_residual, read_entries, read_sites

from ..builders import BUILDERS

SITES = ("attention", "mlp", "middle")
IDS = torch.tensor([[5, 9, 30, 77, 12, 8], [41, 3, 3, 60, 256, 256]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def opened(root: Path) -> tuple[PreTrainedModel, Structure]:
    checkpoint = Checkpoint.open(root)
    return load_model(root, torch.float32, torch.device("cpu")), detect(checkpoint.config, checkpoint.tensors)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return found


@pytest.mark.parametrize("family", BUILDERS)
def test_the_lens_reads_the_last_entry_as_the_model_does(family: str, checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints[family])
    with torch.no_grad():
        entries = read_entries(model, structure, IDS, MASK)
        lens = Lens(model, structure)
        assert len(entries) == structure.layers + 1
        assert torch.allclose(lens.logits(entries[-1]), logits(model), atol=1e-5)
        if not bool((lens.norm.weight == 1).all()):
            # Norming the normed states once more is wrong, and nothing but the numbers shows it.
            assert not torch.allclose(lens.logits(lens.norm(entries[-1])), logits(model), atol=1e-3)
        own = model.model if hasattr(model, "model") else model.base_model
        stock = own(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        for ours, theirs in zip(entries[:-1], stock[:-1], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
        assert torch.allclose(lens.norm(entries[-1]), stock[-1], atol=1e-6)


@pytest.mark.parametrize("family", BUILDERS)
def test_what_a_block_adds_is_what_its_sites_hold(family: str, checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints[family])
    with torch.no_grad():
        entries = read_entries(model, structure, IDS, MASK)
        attention, mlp, middle = (
            read_sites(model, structure, site, IDS, MASK) for site in ("attention", "mlp", "middle")
        )
        assert attention is not None
        assert mlp is not None
        for layer in range(structure.layers):
            added = entries[layer + 1] - entries[layer]
            assert torch.allclose(attention[layer] + mlp[layer], added, atol=1e-5)
            if middle is not None:
                assert torch.allclose(middle[layer], entries[layer] + attention[layer], atol=1e-5)
    assert (middle is None) == (family in {"gpt_neox", "olmo2"})


@pytest.mark.parametrize("family", ["tied_llama", "gpt2", "gemma", "gemma2", "gpt_neox", "mixtral"])
def test_changes_reach_every_entry_and_go_away(family: str, checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints[family])
    plain = logits(model)
    seen: list[int] = []

    def keep(entry: int, states: torch.Tensor) -> torch.Tensor:
        seen.append(entry)
        return states

    with changed_residual(model, structure, keep):
        assert torch.equal(logits(model), plain)
    assert seen == list(range(structure.layers + 1))
    for moved in range(structure.layers + 1):

        def shift(entry: int, states: torch.Tensor, moved: int = moved) -> torch.Tensor:
            pattern = torch.arange(states.shape[-1], dtype=states.dtype).cos()
            return states + pattern if entry == moved else states

        with changed_residual(model, structure, shift):
            assert not torch.allclose(logits(model), plain, atol=1e-3)
    assert torch.equal(logits(model), plain)
