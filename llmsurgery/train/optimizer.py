"""The optimizers of the training loop, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from llmsurgery.compute.quantised import import_bitsandbytes
from llmsurgery.train.config import TrainingConfig
from llmsurgery.train.lion import Lion


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], lr: float, config: TrainingConfig, factors: Sequence[float] = ()
) -> torch.optim.Optimizer:
    """Return AdamW with its moments in fp32, or in 8 bits for tensors of 4096 entries and more, or Lion.

    Args:
        parameters: What moves.
        lr: Step size.
        config: Hyperparameters.
        factors: Factor of the step size of each parameter; empty for 1 throughout.

    Raises:
        UnsupportedError: 8-bit moments are asked for and bitsandbytes is not there.
    """
    # Consecutive parameters of one step size are a group, so that the order of the parameters stays.
    runs = groupby(zip(parameters, factors or [1.0] * len(parameters), strict=True), key=lambda pair: pair[1])
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter, _ in run], "lr": lr * factor} for factor, run in runs
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=config.weight_decay)
    if config.optimizer == "lion":
        return Lion(groups, lr=lr, weight_decay=config.weight_decay)
    optim = import_bitsandbytes().optim
    optimizer: torch.optim.Optimizer = optim.AdamW8bit(groups, lr=lr, weight_decay=config.weight_decay)
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of an optimizer as named tensors and plain values.

    Args:
        optimizer: Any torch optimizer whose state per parameter holds tensors and plain values.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    # The method of the base class: that of bitsandbytes hides its tensors in another dictionary, for FSDP's sake.
    for index, values in torch.optim.Optimizer.state_dict(optimizer)["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` returned; step sizes stay as they are."""
    state: dict[int, dict[str, Any]] = {}
    named = {name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")}
    for name, value in {**named, **plain}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
