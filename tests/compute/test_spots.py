"""What is seen at one token of a prompt, whether prompts run alone, padded, packed, streamed, or from the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.packing import common_length, make_batch
from llmsurgery.compute.spots import Spot, read_spots
from llmsurgery.compute.stream import StreamedModel

from ..builders import BUILDERS
from ..builders.saving import save

CPU = torch.device("cpu")
BEGINNING = (5, 9, 11, 7, 3, 8)
PROMPTS = [
    Spot((*BEGINNING, 20, 21, 22), 7),
    Spot((*BEGINNING, 30), 6),
    Spot((*BEGINNING, 40, 41, 42, 43, 44), 10),
    Spot((*BEGINNING, 50, 51), 2),
]


def structure_of(root: Path) -> Structure:
    checkpoint = Checkpoint.open(root)
    return detect(checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_packed_prompts_compute_what_each_does_alone(name: str, checkpoints: dict[str, Path]) -> None:
    structure = structure_of(checkpoints[name])
    model = load_model(checkpoints[name], torch.float32, CPU, buffers=structure.family.buffers)
    batch = make_batch(model, [spot.ids for spot in PROMPTS], [spot.position for spot in PROMPTS], 0)
    assert batch.inputs["input_ids"].shape == (1, len(BEGINNING) + 11)
    last = structure.layers - 1
    for ends in (True, False):
        together = read_spots(model, structure, PROMPTS, 0, (), (0, last), ends=ends)
        for number, spot in enumerate(PROMPTS):
            alone = read_spots(model, structure, [spot], 0, (), (0, last), ends=ends)
            for block in (0, last):
                assert torch.allclose(together.states[block][number], alone.states[block][0], atol=2e-5)
            if together.ends is not None and alone.ends is not None:
                assert torch.allclose(together.ends[number], alone.ends[0], atol=2e-5)


def test_prompts_without_a_common_beginning_are_padded(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["sharded_llama"], torch.float32, CPU)
    prompts = [(1, 2, 3), (4, 5)]
    batch = make_batch(model, prompts, [1, 1], 9)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.ends.tolist() == [2, 1]
    assert (common_length(prompts), common_length([(1, 2), (1, 2, 3)]), common_length([(1, 2)])) == (0, 1, 1)


def test_windows_of_attention_are_not_packed(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["sharded_llama"], torch.float32, CPU)
    ids, positions = [spot.ids for spot in PROMPTS], [spot.position for spot in PROMPTS]
    model.config.sliding_window = 8
    assert len(make_batch(model, ids, positions, 0).inputs["input_ids"]) == len(PROMPTS)


def test_a_changed_model_is_run_from_the_changed_block(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)
    root = save(LlamaForCausalLM(config), tmp_path / "model", torch.bfloat16)
    structure = structure_of(root)
    layers = structure.layers
    targets = structure.select(("mlp.down",), tuple(range(2, layers)))
    model = load_model(root, torch.float32, CPU)
    streamed = StreamedModel.open(root, structure, torch.float32, CPU)
    first = read_spots(model, structure, PROMPTS, 0, (), (layers - 1,), breaks=(2,))
    draw = torch.Generator().manual_seed(0)

    def same(count: int) -> None:
        """Compare what is seen at the end, and count the blocks that were read for it."""
        before = streamed.blocks_read
        one = read_spots(model, structure, PROMPTS, 0, targets[-1:], (layers - 1,), breaks=(2,))
        other = read_spots(streamed, structure, PROMPTS, 0, targets[-1:], (layers - 1,), breaks=(2,))
        assert torch.allclose(one.states[layers - 1], other.states[layers - 1], atol=1e-5)
        assert torch.allclose(one.keys[layers - 1], other.keys[layers - 1], atol=1e-5)
        assert streamed.blocks_read - before == count

    stored = {target.stored: model.get_parameter(target.stored).clone() for target in targets}
    with streamed.editing(range(2, layers)):
        same(layers)
        for target in targets:
            new = torch.randn(target.shape, generator=draw).bfloat16().float()
            model.get_parameter(target.stored).data.copy_(new)
            streamed.replacement(target).copy_(new)
            assert target.layer is not None
            same(layers - target.layer)
    for name, values in stored.items():
        model.get_parameter(name).data.copy_(values)
    # The stored values are back, and what enters the first edited block is still known.
    same(layers - 2)
    again = read_spots(streamed, structure, PROMPTS, 0, (), (layers - 1,), breaks=(2,))
    assert torch.allclose(first.states[layers - 1], again.states[layers - 1], atol=1e-5)
    # Other prompts are not.
    before = streamed.blocks_read
    read_spots(streamed, structure, PROMPTS[:1], 0, (), (layers - 1,))
    assert streamed.blocks_read - before == layers
    # Nor is a block skipped that is looked at.
    seen = read_spots(streamed, structure, PROMPTS[:2], 0, (), (0,))
    assert torch.allclose(seen.states[0], read_spots(model, structure, PROMPTS[:2], 0, (), (0,)).states[0], atol=1e-5)
