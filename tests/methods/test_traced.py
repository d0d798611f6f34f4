"""Layers chosen by a trace: the span of the targets' own layers, and what is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.progress import Silent
from llmsurgery.data.records import read_rows
from llmsurgery.data.subjects import make_facts
from llmsurgery.demo import world_path
from llmsurgery.methods.traced import trace_layers
from llmsurgery.run.encoding import make_encoder

Choose = Callable[[Sequence[str], Sequence[int], int], tuple[list[int], dict[str, Any]]]


@pytest.fixture(scope="module")
def choose() -> Choose:
    checkpoint = Checkpoint.open(world_path("model"))
    structure = detect(checkpoint.config, checkpoint.tensors)
    model = load_model(checkpoint.root, torch.float32, torch.device("cpu"), False, structure.family.buffers)
    facts, _ = make_facts(make_encoder(checkpoint), read_rows(world_path("forget.jsonl"))[:2])
    operation: Any = SimpleNamespace(model=model, structure=structure, progress=Silent())

    def chosen(roles: Sequence[str], layers: Sequence[int], span: int) -> tuple[list[int], dict[str, Any]]:
        targets = structure.select(tuple(roles), tuple(layers) or None, None)
        return trace_layers(operation, targets, facts, span, 2, 3.0, 1)

    return chosen


def test_span_has_the_highest_effect_of_all(choose: Choose) -> None:
    layers, record = choose(["mlp"], [], 0)
    effects = record["effects_at_subject"]
    # Three eighths of five layers.
    assert layers == max(([i, i + 1] for i in range(4)), key=lambda pair: sum(effects[i] for i in pair))
    assert record["kind"] == "mlp"
    assert choose(["mlp"], [], 9)[0] == [0, 1, 2, 3, 4]


def test_layers_without_targets_are_passed_over(choose: Choose) -> None:
    layers, record = choose(["mlp"], [1, 3, 4], 2)
    effects = record["effects_at_subject"]
    assert layers == max(([1, 3], [3, 4]), key=lambda pair: sum(effects[i] for i in pair))
    assert choose(["embed"], [], 2) == ([], {"facts": 0, "not_known": 0})


@pytest.mark.parametrize(
    ("roles", "kind"), [(["attention"], "attention"), (["mlp.up", "attn.q"], "block"), (["mlp.down"], "mlp")]
)
def test_outputs_of_what_moves_are_traced(roles: list[str], kind: str, choose: Choose) -> None:
    assert choose(roles, [], 1)[1]["kind"] == kind
