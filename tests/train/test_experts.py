"""Training routed experts: the fused parameter in memory, the stored tensor per expert in the edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.head import batch_log_probabilities
from llmsurgery.compute.load import load_model
from llmsurgery.compute.view import weight_view
from llmsurgery.edits.kinds import LowRank, Replace
from llmsurgery.errors import UsageError
from llmsurgery.methods.settings import resolve_config
from llmsurgery.train.config import TrainingConfig, trained_tensors
from llmsurgery.train.loop import TrainingResult, train
from llmsurgery.train.session import Session
from llmsurgery.train.trainable import prepare_trainable

from ..builders import MOE_BUILDERS

EXPERT = ("expert.gate", "expert.up", "expert.down")


class Bench:
    """A loaded MoE model and a plain loss on fixed tokens."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = Checkpoint.open(root)
        self.structure: Structure = detect(self.checkpoint.config, self.checkpoint.tensors)
        self.model: PreTrainedModel = load_model(root, dtype, torch.device("cpu"))
        self.ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(2))
        self.mask = torch.ones_like(self.ids)
        self.labels = self.mask.bool()
        self.labels[:, 0] = False
        self.autocast: torch.dtype | None = None

    def read(self, name: str) -> np.ndarray:
        return decode(self.checkpoint.read(name), self.checkpoint.info(name).dtype)

    def loss(self, indices: Sequence[int]) -> torch.Tensor:
        rows = list(indices)
        scores, _ = batch_log_probabilities(
            self.model, self.ids[rows], self.mask[rows], self.labels[rows], self.autocast
        )
        return -scores.mean()

    def train(self, **settings: object) -> tuple[TrainingResult, dict[str, np.ndarray]]:
        config: TrainingConfig = resolve_config(
            TrainingConfig, {"train": "full", "lr": 1e-2, "max_steps": 3, "batch_size": 3, **settings}
        )
        torch.manual_seed(0)
        with prepare_trainable(self.model, trained_tensors(config, self.structure), config, self.read) as trainable:
            self.autocast = trainable.autocast
            result = train(trainable, self.loss, 3, config, Session())
            edits = trainable.edits()
        values = {}
        for edit in edits:
            assert isinstance(edit, LowRank | Replace)
            values[edit.name] = edit.u @ edit.v + self.read(edit.name) if isinstance(edit, LowRank) else edit.values
        assert len(values) == len(edits)
        return result, values

    def by_name(self) -> dict[str, RoleTensor]:
        return {tensor.stored: tensor for tensor in self.structure.tensors}


def last_layer(structure: Structure) -> int:
    """A block with routed experts."""
    return structure.layers - 1


@pytest.mark.parametrize("architecture", MOE_BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_describe_the_trained_model(architecture: str, dtype: torch.dtype, checkpoints: dict[str, Path]) -> None:
    bench, plain = Bench(checkpoints[architecture], dtype), Bench(checkpoints[architecture])
    result, values = bench.train(roles="expert.gate,expert.up,expert.down,router", lr=5e-3, max_steps=12)
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < 0.9 * result.first_loss
    names = bench.by_name()
    routed = [t for t in bench.structure.tensors if t.role in (*EXPERT, "router") and t.part == "weight"]
    assert set(values) == {tensor.stored for tensor in routed}
    with torch.no_grad():
        for name, value in values.items():
            weight_view(plain.model, names[name]).copy_(torch.from_numpy(value))
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(bench.loss(range(3)).float(), plain.loss(range(3)), atol=tolerance, rtol=0)


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])
def test_one_expert_and_its_router_move_alone(architecture: str, checkpoints: dict[str, Path]) -> None:
    bench, plain = Bench(checkpoints[architecture]), Bench(checkpoints[architecture])
    layer = last_layer(bench.structure)
    # Strong weight decay: what is not chosen must not feel it either.
    _, values = bench.train(
        roles="expert.gate,expert.up,expert.down,router", layers=str(layer), experts="2", weight_decay=0.5
    )
    names = bench.by_name()
    moved = sorted((names[name].role, names[name].expert) for name in values if names[name].role != "router")
    assert moved == [("expert.down", 2), ("expert.gate", 2), ("expert.up", 2)]
    assert len(values) == 4
    for name, value in values.items():
        assert np.abs(value - bench.read(name)).max() > 1e-3, name
    # The live model holds the trained values in these slices and the old ones everywhere else.
    for target in bench.structure.tensors:
        if target.fused is not None:
            fused = getattr(bench.model.get_submodule(target.module), target.fused.parameter)
            assert target.expert is not None
            live = fused[target.expert].chunk(target.fused.blocks)[target.fused.block]
            before = weight_view(plain.model, target)
            assert torch.equal(live, before) == (target.stored not in values), target.stored


def test_gradients_equal_those_of_the_fused_parameter(checkpoints: dict[str, Path]) -> None:
    bench, plain = Bench(checkpoints["qwen3_moe"]), Bench(checkpoints["qwen3_moe"])
    targets = [t for t in bench.structure.tensors if t.fused is not None]
    config: TrainingConfig = resolve_config(TrainingConfig, {"train": "full", "lr": 1.0})
    with prepare_trainable(bench.model, targets, config, bench.read) as trainable:
        assert trainable.autocast is None
        assert len(trainable.parameters) == len(targets)
        bench.loss(range(3)).backward()
        ours = {edit.name: p.grad for edit, p in zip(trainable.edits(), trainable.parameters, strict=True)}
    for name, parameter in plain.model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    plain.model.train()
    plain.loss(range(3)).backward()
    for target in targets:
        assert target.fused is not None
        assert target.expert is not None
        fused = plain.model.get_submodule(target.module).get_parameter(target.fused.parameter)
        assert fused.grad is not None
        expected = fused.grad[target.expert].chunk(target.fused.blocks)[target.fused.block]
        mine = ours[target.stored]
        assert mine is not None
        torch.testing.assert_close(mine, expected, atol=1e-7, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(checkpoints: dict[str, Path]) -> None:
    settings = {"roles": "all", "lr": 1e-3}
    _, plain = Bench(checkpoints["mixtral"]).train(**settings)
    _, checkpointed = Bench(checkpoints["mixtral"]).train(**settings, gradient_checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(checkpointed[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("role", ["expert.up", "router", "router.shared"])
def test_adapters_on_experts_and_routers_are_refused(role: str, checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["qwen2_moe"])
    config: TrainingConfig = resolve_config(TrainingConfig, {"roles": role})
    with pytest.raises(UsageError, match=f"adapters cannot be put on {role}") as caught:
        trained_tensors(config, bench.structure)
    assert "train=full" in caught.value.fix


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_adapters_on_the_dense_mlp_leave_experts_alone(architecture: str, checkpoints: dict[str, Path]) -> None:
    # Left to itself, peft takes gate_proj and the like for experts here.
    bench, plain = Bench(checkpoints[architecture]), Bench(checkpoints[architecture])
    _, values = bench.train(train="lora", roles="mlp.gate,mlp.up,mlp.down,shared.gate,shared.up,shared.down")
    assert len(values) == 6
    names = bench.by_name()
    with torch.no_grad():
        for name, value in values.items():
            assert np.abs(value - bench.read(name)).max() > 1e-3
            weight_view(plain.model, names[name]).copy_(torch.from_numpy(value))
        torch.testing.assert_close(bench.loss(range(3)), plain.loss(range(3)), atol=1e-5, rtol=0)


def test_experts_of_a_dense_model_are_a_usage_error(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["mistral"])
    config: TrainingConfig = resolve_config(TrainingConfig, {"experts": "1"})
    with pytest.raises(UsageError, match="expert 1 does not exist"):
        trained_tensors(config, detect(checkpoint.config, checkpoint.tensors))
