"""A gate on the channels of the residual stream, and what mixes the dropped ones into those that stay.

With d the width, x what a module writes into the stream, M the gate that all of them share, and of each module its own
L0 [r, d], L1 [d, r] and v [d]:

    z = v * M * (x + L1 L0 x)                                       after the embedding, every attention and every MLP
    M = 1 / (1 + exp(min(-tau w, 10))) + beta                                 at step s of a horizon s0, w [d] learned
    tau = 1 / (1 - ln max(1, s) / ln s0 + 1e-6),   beta = max(0.5 - s / s0, 0)

From 0.8 s0 on tau stays and w stands still. At first w = 0, L1 = 0, v = 1 and M = 1: nothing changes. A rounded gate is
1 for the channels that stay and 0 for the others.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure

SETTLED = 0.8
"""Share of the horizon after which the gate learns no more."""

LARGEST_EXPONENT = 10.0
"""Keeps a gate at 4.5e-5 at least, so that its gradient does not vanish."""

UNDECIDED = 0.05
"""A proxy nearer to 0 has not come to a decision: at the paper's last temperature its gate lies between .11 and .89."""

FIXED_DECAY = 2.77
"""A gate that is not learned falls to exp(-2.77) at the horizon, and twice as fast behind it."""

Place = tuple[str, int | None]
"""Where a module stands: ("embed", None), ("attn", layer) or ("mlp", layer)."""


def temperature(step: float, horizon: int) -> float:
    """Return tau, from 1 at the start to ln s0 / 0.223 where the gate stands still."""
    reached = min(float(step), SETTLED * horizon)
    return 1 / (1 - math.log(max(1.0, reached)) / math.log(horizon) + 1e-6)


def offset(step: float, horizon: int) -> float:
    """Return beta, which holds every gate open at first."""
    return max(0.5 - step / horizon, 0.0)


def soft_gate(proxy: torch.Tensor, step: float, horizon: int) -> torch.Tensor:
    """Return M of a step; from 0.8 of the horizon on no gradient reaches the proxy.

    Args:
        proxy: w [channels].
        step: Optimizer steps taken.
        horizon: s0, at least 2.
    """
    learned = proxy if step < SETTLED * horizon else proxy.detach()
    exponent = (-temperature(step, horizon) * learned).clamp(max=LARGEST_EXPONENT)
    return 1 / (1 + exponent.exp()) + offset(step, horizon)


def fixed_gate(kept: torch.Tensor, step: float, horizon: int) -> torch.Tensor:
    """Return the gate of a set that was chosen before training: 1 for what stays, and a decay for the others.

    Args:
        kept: True for the channels that stay [channels].
        step: Optimizer steps taken.
        horizon: s0.
    """
    late = max(0.0, step / horizon - 1)
    decay = math.exp(-FIXED_DECAY * min(step / horizon, 1.0) - 2 * FIXED_DECAY * late)
    return torch.where(kept, 1.0, decay)


def count_loss(proxy: torch.Tensor, keep: int) -> torch.Tensor:
    """Return 10 |#(w >= 0) - k| / k, and what draws every w to 0.5 or -0.5 [].

    The count has a gradient of 1 in every channel. Means over no channel count as 0.

    Args:
        proxy: w [channels].
        keep: k.
    """
    count = (proxy >= 0).sum() + (proxy.sum() - proxy.sum().detach())
    loss = 10 * (count - keep).abs() / keep
    above = proxy > 0
    for side, centre in ((above, 0.5), (~above, -0.5)):
        if bool(side.any()):
            loss = loss + (proxy[side] - centre).square().mean()
    return loss


def identity_loss(factor: torch.Tensor) -> torch.Tensor:
    """Return the mean of (L0 L0^T - I)^2 [].

    Args:
        factor: L0 [rank, channels].
    """
    return (factor @ factor.T - torch.eye(len(factor), device=factor.device)).square().mean()


class Operator(torch.nn.Module):
    """One module's mixing D = I + L1 L0 and its scales v, fp32.

    Args:
        width: d.
        rank: r; 0 for no mixing and no scales.
        scaled: Whether v is trained.
    """

    def __init__(self, width: int, rank: int, scaled: bool) -> None:
        super().__init__()
        self.inner = torch.nn.Parameter(torch.empty(rank, width), requires_grad=rank > 0)
        self.outer = torch.nn.Parameter(torch.zeros(width, rank), requires_grad=rank > 0)
        self.scale = torch.nn.Parameter(torch.ones(width), requires_grad=scaled and rank > 0)
        if rank:
            torch.nn.init.kaiming_uniform_(self.inner, a=math.sqrt(5))

    def forward(self, written: torch.Tensor) -> torch.Tensor:
        """Return v * (x + L1 L0 x) of states [..., width] in fp32."""
        mixed = written.float()
        if len(self.inner):
            mixed = mixed + (mixed @ self.inner.T) @ self.outer.T
        return self.scale * mixed


class Manner(enum.Enum):
    """How a gate stands."""

    SOFT = "soft"
    """As in training."""
    POSITIVE = "positive"
    """Open where w > 0."""
    ROUNDED = "rounded"
    """Open for exactly the k channels that stay."""
    AWAY = "away"
    """Neither gate nor operators: the model as it was."""


class WidthGate(torch.nn.Module):
    """The gate and the operators of a model.

    Args:
        places: Where operators stand -> their rank; 0 for the gate alone.
        width: d.
        keep: k.
        horizon: s0.
        scaled: Whether scales are trained.
        fixed: The channels that stay, if they are not learned [d].
    """

    def __init__(
        self,
        places: Mapping[Place, int],
        width: int,
        keep: int,
        horizon: int,
        scaled: bool = True,
        fixed: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.keep, self.horizon, self.fixed = keep, max(2, horizon), fixed
        self.proxy = torch.nn.Parameter(torch.zeros(width), requires_grad=fixed is None)
        self.places = list(places)
        self.operators = torch.nn.ModuleList(Operator(width, rank, scaled) for rank in places.values())
        self.step = 0
        self.manner = Manner.SOFT

    def operator(self, place: Place) -> Operator:
        """Return the operator of a place."""
        found = self.operators[self.places.index(place)]
        assert isinstance(found, Operator)
        return found

    def kept(self) -> torch.Tensor:
        """Return the k channels that stay, those of the largest w and the first among equals [d], bool."""
        if self.fixed is not None:
            return self.fixed
        order = self.proxy.detach().argsort(descending=True, stable=True)[: self.keep]
        return torch.zeros_like(self.proxy, dtype=torch.bool).index_fill(0, order, True)

    def values(self) -> torch.Tensor:
        """Return M as the gate stands [d], fp32."""
        if self.manner is Manner.ROUNDED:
            return self.kept().float()
        if self.fixed is not None:
            return fixed_gate(self.fixed, self.step, self.horizon)
        if self.manner is Manner.POSITIVE:
            return (self.proxy.detach() > 0).float()
        return soft_gate(self.proxy, self.step, self.horizon)

    def undecided(self) -> float:
        """Return the share of the gates that are undecided."""
        return 0.0 if self.fixed is not None else float((self.proxy.detach().abs() < UNDECIDED).float().mean())

    def losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the count, 0 once the gate stands still, and the mean identity loss of the operators."""
        zero = self.proxy.new_zeros(())
        learning = self.fixed is None and self.step < SETTLED * self.horizon
        identities = [identity_loss(o.inner) for o in self.operators if isinstance(o, Operator) and len(o.inner)]
        identity = torch.stack(identities).mean() if identities else zero
        return count_loss(self.proxy, self.keep) if learning else zero, identity

    def moving(self) -> list[torch.nn.Parameter]:
        """Return the parameters of the operators that train; the proxy is not among them."""
        return [parameter for parameter in self.operators.parameters() if parameter.requires_grad]

    @contextmanager
    def standing(self, manner: Manner) -> Iterator[None]:
        """Let the gate stand in another way for the length of a `with` block."""
        before, self.manner = self.manner, manner
        try:
            yield
        finally:
            self.manner = before

    @contextmanager
    def attached(self, model: PreTrainedModel, structure: Structure) -> Iterator[None]:
        """Let every module of a model write through its operator and the gate, for the length of a `with` block.

        Args:
            model: A loaded model, with adapters or without.
            structure: Its roles.
        """
        modules = written_modules(model, structure)
        handles = [modules[place].register_forward_hook(partial(self._through, place)) for place in self.places]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _through(self, place: Place, _module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        if self.manner is Manner.AWAY:
            return None
        states = output[0] if isinstance(output, tuple) else output
        gated = (self.values() * self.operator(place)(states)).to(states.dtype)
        return (gated, *output[1:]) if isinstance(output, tuple) else gated


def written_modules(model: PreTrainedModel, structure: Structure) -> dict[Place, torch.nn.Module]:
    """Return the modules whose outputs are added to the residual stream, the embedding first.

    Of a mixture of experts it is the whole of it: an operator on the sum of experts is one on each of them.
    """
    modules: dict[Place, torch.nn.Module] = {("embed", None): model.get_input_embeddings()}
    weights = [tensor for tensor in structure.tensors if tensor.part == "weight"]
    for tensor in weights:
        if tensor.role == "attn.o":
            modules["attn", tensor.layer] = model.get_submodule(tensor.module)
        elif tensor.role == "mlp.down":
            modules["mlp", tensor.layer] = model.get_submodule(tensor.module)
        elif tensor.role == "router":
            modules["mlp", tensor.layer] = model.get_submodule(tensor.module.rpartition(".")[0])
    return modules
