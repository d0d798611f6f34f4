"""Both sides of the benchmark of training steps take the same first step: the plain losses are those of the methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.training_setup import CASES, Case, Clock, load
from benchmarks.training_sides import make_setting, own_step, plain_step
from benchmarks.unlearning import METHODS

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, **SHAPE)).save_pretrained(root / "dense")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=6, **SHAPE, **experts)).save_pretrained(root / "experts")
    return {"dense": root / "dense", "experts": root / "experts"}


@pytest.mark.parametrize("name", METHODS)
def test_both_sides_begin_at_the_same_loss(name: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "tiny", Case(3, 5, 4))
    losses = []
    for step in (own_step, plain_step):
        setting = make_setting(load(models["experts" if name == "uoe" else "dense"]), None, name, "tiny")
        clock = Clock()
        losses.append(step(setting, clock))
        assert len(clock.steps) == 2
        assert clock.peak > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    assert losses[0] != 0
