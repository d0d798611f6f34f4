"""Batches that walk through the blocks compute what the whole model does; statistics see what enters matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.accumulate import SecondMoment
from llmsurgery.compute.inputs import watched_inputs
from llmsurgery.compute.load import load_model
from llmsurgery.compute.residual import read_entries
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.compute.view import weight_view
from llmsurgery.compute.walk import BlockWalk

CPU = torch.device("cpu")
# Longer than the sliding windows of these families; the last batch has another number of rows.
BATCHES = [torch.arange(60).reshape(2, 30), torch.arange(30)[None] + 70]


def opened(root: Path) -> tuple[Any, Structure]:
    checkpoint = Checkpoint.open(root)
    return load_model(root, torch.float32, CPU), detect(checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2", "gemma3", "gpt_neox", "mixtral", "deepseek_v3"])
def test_the_walk_is_the_forward(architecture: str, checkpoints: dict[str, Path]) -> None:
    root = checkpoints[architecture]
    model, structure = opened(root)
    with torch.inference_mode():
        wanted = [read_entries(model, structure, batch, torch.ones_like(batch)) for batch in BATCHES]
    for walked in (model, StreamedModel.open(root, structure, torch.float32, CPU)):
        walk = BlockWalk(walked, structure, BATCHES)
        for layer in range(structure.layers):
            for state, entries in zip(walk.states, wanted, strict=True):
                torch.testing.assert_close(state, entries[layer], rtol=1e-4, atol=1e-4)
            with walk.held():
                walk.look()
                torch.testing.assert_close(walk.states[0], wanted[0][layer], rtol=1e-4, atol=1e-4)
                walk.advance()
        for state, entries in zip(walk.states, wanted, strict=True):
            torch.testing.assert_close(state, entries[-1], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(read_entries(model, structure, BATCHES[0], torch.ones_like(BATCHES[0]))[-1], wanted[0][-1])


class Kept:
    """Keeps all vectors, in place of a statistic."""

    def __init__(self, size: int) -> None:
        self.size, self.parts = size, []

    def update(self, values: torch.Tensor) -> None:
        self.parts.append(values)


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2"])
def test_matrices_that_read_one_tensor_share_a_statistic(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints[architecture])
    targets = [tensor for tensor in structure.select(["linear"]) if tensor.layer == 0]
    outputs: dict[str, list[torch.Tensor]] = {target.module: [] for target in targets}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, output, path=path: outputs[path].append(output))
        for path in outputs
    ]
    walk = BlockWalk(model, structure, BATCHES)
    with watched_inputs(model, structure, targets, Kept) as statistic, walk.held():
        walk.look()
    for handle in handles:
        handle.remove()
    for target in targets:
        weight = weight_view(model, target)
        bias = getattr(model.get_submodule(target.module), "bias", None)
        made = torch.cat(statistic(target).parts) @ (weight if target.transposed else weight.T)
        made = made if bias is None else made + bias
        wanted = torch.cat([output.reshape(-1, output.shape[-1]) for output in outputs[target.module]])
        torch.testing.assert_close(made, wanted)
    by_role = {target.role: statistic(target) for target in targets}
    if "attn.q" in by_role:
        assert by_role["attn.q"] is by_role["attn.k"] is by_role["attn.v"]
        assert by_role["mlp.gate"] is by_role["mlp.up"] is not by_role["mlp.down"]


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_forward_ends_behind_the_last_input(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints[architecture])
    targets = [tensor for tensor in structure.select(["linear"]) if tensor.layer == 0]
    found, products = [], []
    for ended in (False, True):
        walk, ran = BlockWalk(model, structure, BATCHES), []
        handles = [
            model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))  # noqa: B023
            for path in dict.fromkeys(target.module for target in targets)
        ]
        with walk.held():
            with watched_inputs(model, structure, targets, SecondMoment, walk.block if ended else None) as statistic:
                walk.look()
            walk.advance()
        for handle in handles:
            handle.remove()
        found.append([statistic(target) for target in targets])
        products.append(len(ran))
    assert products[1] == products[0] - len(BATCHES)
    for whole, short in zip(*found, strict=True):
        assert short.count == whole.count > 0
        assert torch.equal(short.sum, whole.sum)


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v2_lite"])
def test_experts_see_the_tokens_that_are_sent_to_them(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints[architecture])
    roles = ["expert.gate", "expert.up", "expert.down"]
    targets = [tensor for tensor in structure.select(roles) if tensor.layer == 1]
    walk = BlockWalk(model, structure, BATCHES)
    with walk.held():
        walk.advance()
    with watched_inputs(model, structure, targets, Kept) as statistic, walk.held():
        walk.look()
    module: Any = model.get_submodule(targets[0].module)
    seen = 0
    for target in targets:
        if target.role != "expert.down":
            continue
        entering = next(t for t in targets if t.expert == target.expert and t.role == "expert.up")
        hidden = torch.cat(statistic(entering).parts)
        seen += len(hidden)
        # Sent to this expert alone, with weight 1.
        index = torch.full((len(hidden), 1), int(target.expert or 0))
        with torch.inference_mode():
            wanted = module(hidden, index, torch.ones(len(hidden), 1))
            made = torch.cat(statistic(target).parts) @ weight_view(model, target).T
        torch.testing.assert_close(made, wanted)
    tokens = sum(batch.numel() for batch in BATCHES)
    assert seen == tokens * model.config.num_experts_per_tok


def test_statistics_of_parts_are_those_of_the_whole(checkpoints: dict[str, Path]) -> None:
    model, structure = opened(checkpoints["sharded_llama"])
    targets = structure.select(["mlp.down"], [0])
    found = []
    for batches in (BATCHES, [torch.cat(BATCHES)]):
        walk = BlockWalk(model, structure, batches)
        with watched_inputs(model, structure, targets, SecondMoment) as statistic, walk.held():
            walk.look()
        found.append(statistic(targets[0]))
    assert found[0].count == found[1].count == 90
    torch.testing.assert_close(found[0].sum, found[1].sum)
