"""What moves during training: LoRA adapters on roles, or the weights themselves in fp32; and how it becomes edits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor
from llmsurgery.edits.kinds import Edit, LowRank, Replace
from llmsurgery.errors import SurgeryError
from llmsurgery.train.config import TrainingConfig, require_trainable_roles
from llmsurgery.train.experts import attach_experts

ReadTensor = Callable[[str], npt.NDArray[np.floating]]
"""Reads a stored tensor as float32 (float64 if stored so)."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""B [outputs, rank] and A [rank, inputs] of an adapter, without its scale."""

_START = "start"
"""Name of the second adapter that holds where the first one started."""


@dataclass(frozen=True)
class Trainable:
    """A model prepared for training.

    Attributes:
        model: The causal language model; adapters, if any, are active inside it.
        parameters: The fp32 parameters that move.
        autocast: Dtype of matrix products if trained weights are wider than the compute dtype, else None.
        edits: Returns the current state as edits.
        reference: Context manager in which the model answers as it did before training (adapters only).
        factors: Factor of the step size of each parameter; empty for 1 throughout.
    """

    model: PreTrainedModel
    parameters: list[torch.nn.Parameter]
    autocast: torch.dtype | None
    edits: Callable[[], list[Edit]]
    reference: Callable[[], AbstractContextManager[None]] | None
    factors: Sequence[float] = ()


@contextmanager
def prepare_trainable(
    model: PreTrainedModel,
    targets: Sequence[RoleTensor],
    config: TrainingConfig,
    read: ReadTensor,
    start: Mapping[str, Factors] | None = None,
) -> Iterator[Trainable]:
    """Make some weights trainable for the length of a `with` block.

    Args:
        model: A loaded model without gradients; it is changed in place and not fit for other use afterwards.
        targets: The stored tensors that may move.
        config: Training hyperparameters.
        read: Reads stored tensors, so that full training starts from the stored values and not from a rounded copy.
        start: Stored name -> factors that its adapter starts from, for every target. The model then computes
            W + scale (B A - B0 A0), which is what it computed before at the first step, and the edits say the same.

    Yields:
        The prepared model.
    """
    require_trainable_roles(targets, config)
    if config.gradient_checkpointing:
        recompute_activations(model)
    trainable = _lora(model, targets, config, start) if config.train == "lora" else _full(model, targets, read)
    model.train()
    try:
        yield trainable
    finally:
        model.eval()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep the inputs of the blocks alone for the backward, which computes the rest again."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Frozen embeddings would leave the checkpointed blocks without an input that needs gradients.
    model.enable_input_require_grads()


def _lora(
    model: PreTrainedModel,
    targets: Sequence[RoleTensor],
    config: TrainingConfig,
    start: Mapping[str, Factors] | None,
) -> Trainable:
    from peft import LoraConfig, get_peft_model

    by_module = {target.module: target for target in targets}
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(by_module),
        fan_in_fan_out=any(target.transposed for target in targets),
        bias="none",
    )
    with warnings.catch_warnings(), _without_model_type(model):
        # peft asks transformers for a property under its old name.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        peft_model = get_peft_model(model, settings)
        if start is not None:
            peft_model.add_adapter(_START, replace(settings, lora_dropout=0.0))
    if {name for name, module in model.named_modules() if hasattr(module, "lora_A")} != by_module.keys():
        raise SurgeryError("peft put adapters on other modules than it was asked to")
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in by_module}
    if start is not None:
        _begin(layers, {name: start[target.stored] for name, target in by_module.items()})
        peft_model.base_model.set_adapter(["default", _START])
        _freeze(layers, _START)

    def edits() -> list[Edit]:
        return [_low_rank(layers[name], target, start is not None) for name, target in by_module.items()]

    @contextmanager
    def reference() -> Iterator[None]:
        with peft_model.disable_adapter():
            yield
        # peft makes all active adapters trainable when it switches them on again.
        _freeze(layers, _START)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trainable(model, parameters, None, edits, reference)


def _begin(layers: Mapping[str, Any], factors: Mapping[str, Factors]) -> None:
    """Let adapters start from given factors, and take these off again by a second adapter of opposite sign.

    The weights stay as they are stored: a residual W - scale B0 A0 in a 16-bit dtype would be another rounding of W.
    """
    for name, layer in layers.items():
        left, right = factors[name]
        with torch.no_grad():
            for adapter in ("default", _START):
                layer.lora_B[adapter].weight.copy_(left)
                layer.lora_A[adapter].weight.copy_(right)
        layer.scaling[_START] = -layer.scaling["default"]


def _freeze(layers: Mapping[str, Any], adapter: str) -> None:
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B):
            if adapter in factors:
                factors[adapter].requires_grad_(False)


def _low_rank(layer: Any, target: RoleTensor, started: bool) -> LowRank:
    """Return scale B A, or scale (B A - B0 A0) with both pairs side by side, for the stored orientation."""
    adapters = ("default", _START) if started else ("default",)
    left = np.concatenate([_double(layer.lora_B[name]) * layer.scaling[name] for name in adapters], axis=1)
    right = np.concatenate([_double(layer.lora_A[name]) for name in adapters], axis=0)
    # The transpose of it for a matrix stored [inputs, outputs].
    u, v = (right.T, left.T) if target.transposed else (left, right)
    return LowRank(target.stored, np.ascontiguousarray(u), np.ascontiguousarray(v))


def _double(factor: torch.nn.Module) -> npt.NDArray[np.float64]:
    weight = factor.get_parameter("weight").detach().cpu().double().numpy()
    return np.asarray(weight)


@contextmanager
def _without_model_type(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's type from peft, which for MoE types takes the names of dense matrices for those of experts.

    It does so to load adapters made with transformers 4: a target that ends in gate_proj, up_proj or down_proj becomes
    an adapter on all experts of all blocks. Our targets are module paths of the loaded model.
    """
    model_type = model.config.model_type
    model.config.model_type = ""
    try:
        yield
    finally:
        model.config.model_type = model_type


def _full(model: PreTrainedModel, targets: Sequence[RoleTensor], read: ReadTensor) -> Trainable:
    compute = model.dtype
    # The stored values in fp32: training does not start from a rounded copy.
    experts = {target: _stored(read, target) for target in targets if target.fused is not None}
    moving = {target.stored: parameter for target, parameter in attach_experts(model, experts).items()}
    wider = False
    for target in targets:
        if target.fused is None:
            parameter = model.get_submodule(target.module).get_parameter(target.part)
            # In place, so that tied modules keep sharing one parameter.
            parameter.data = _stored(read, target).to(parameter.device)
            parameter.requires_grad_(True)
            moving[target.stored] = parameter
            wider = compute != torch.float32

    def trained(target: RoleTensor) -> npt.NDArray[np.floating]:
        values = moving[target.stored].detach().cpu().numpy()
        if target.dtype != "F64":
            return values.copy()
        stored = read(target.stored)
        # fp32 training adds its change to the wider stored values instead of rounding them.
        return stored + (values.astype(np.float64) - stored.astype(np.float32))

    def edits() -> list[Edit]:
        return [Replace(target.stored, trained(target)) for target in targets]

    parameters = list(dict.fromkeys(moving[target.stored] for target in targets))
    # Experts are put together in the compute dtype and need no autocast.
    return Trainable(model, parameters, compute if wider else None, edits, None)


def _stored(read: ReadTensor, target: RoleTensor) -> torch.Tensor:
    return torch.from_numpy(read(target.stored).astype(np.float32))
