"""Norms with a constant in place of the standard deviation, switched on one by one in a stock model.

Per token, s(x) = sqrt(var x + eps), or sqrt(mean x^2 + eps) for an RMSNorm. A norm that is switched divides by a
constant sigma in its place:

    y = (x - mean x) / sigma * g + b          x / sigma * g for an RMSNorm

The mean stays, since taking it off is linear. The norm before attention is switched for queries and keys first, and
for values later: hooks hand the two versions of its output to the matrices. Modules and parameters stay those of the
stock model.

While a norm is as it was, sigma follows s(x): once a step, by the mean over the tokens of the step. It is locked when
the first of its two switches is thrown, so that both divide by the same number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.norms import FINAL, norms_of, value_rows
from llmsurgery.arch.spec import Structure
from llmsurgery.errors import UnsupportedError

REST, FIRST = 0, 1
"""Columns of sigma: all positions (but the first, where that has its own), and the first position."""
OTHERS, VALUES = 0, 1
"""Columns of the switches: queries, keys and everything that is no value; values."""

SPLIT = "norm.attn"


def spread(states: torch.Tensor, centres: bool, eps: float) -> torch.Tensor:
    """Return s(x) of every token, fp32.

    Args:
        states: What a norm reads [..., width].
        centres: Whether the norm takes off the mean.
        eps: What it adds to the variance.
    """
    states = states.float()
    variance = states.var(-1, unbiased=False) if centres else states.square().mean(-1)
    return (variance + eps).sqrt()


def norm_eps(module: torch.nn.Module) -> float:
    """Return what a norm adds to the variance.

    Raises:
        UnsupportedError: The module does not say.
    """
    for name in ("eps", "variance_epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float | int):
            return float(value)
    raise UnsupportedError(
        f"a {type(module).__name__} does not tell its epsilon", "its export could not be checked", ""
    )


@torch.no_grad()
def affine_error(module: torch.nn.Module, states: torch.Tensor) -> float:
    """Return how far a norm is from an affine map: max |2 (N(x) - b) - (N(2 x) - b)| over max |2 (N(x) - b)|.

    It is 0 for an affine map and 1/2 for a norm that divides by the spread of x.

    Args:
        module: The norm; a copy of it computes in fp32.
        states: x [tokens, width].
    """
    wide, states = copy.deepcopy(module).float(), states.float()
    bias = getattr(wide, "bias", None)
    shift = torch.zeros(()) if bias is None else bias
    once, twice = 2 * (wide(states) - shift.to(states.device)), wide(2 * states) - shift.to(states.device)
    return float((once - twice).abs().max() / once.abs().max())


@dataclass
class SigmaState:
    """Everything of the switches that changes in training, as tensors, so that a kept state can hold it.

    Attributes:
        sigma: Constant of every norm [norms, 2], fp64.
        fake: Which switches are thrown [norms, 2].
        sums: Sum of s(x) over the tokens of the step [norms, 2], fp64.
        counts: Number of these tokens [norms, 2], fp64.
        special: Whether the first position has a sigma of its own [].
        ends: Per block, whether end tokens take the first position's sigma for values [blocks].
    """

    sigma: torch.Tensor
    fake: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    special: torch.Tensor
    ends: torch.Tensor

    def named(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return {f"norms.{name}": value for name, value in vars(self).items()}


class FakeNorms:
    """The switches of all norms of a model; hooks are in place as long as `attached` is open.

    Args:
        model: A loaded stock model.
        structure: Its roles.
        end_id: Token that ends a document.
        special: Whether the first position, and end tokens where values are read, have a sigma of their own.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, end_id: int, special: bool = False) -> None:
        self.model, self.structure, self.end_id = model, structure, end_id
        self.norms = norms_of(structure)
        self.centres, self.offset = structure.family.norm_centres, structure.family.norm_offset
        self.modules = [model.get_submodule(norm.weight.module) for norm in self.norms]
        self.eps = norm_eps(self.modules[-1])
        count = len(self.norms)
        self.state = SigmaState(
            sigma=torch.ones(count, 2, dtype=torch.float64),
            fake=torch.zeros(count, 2, dtype=torch.bool),
            sums=torch.zeros(count, 2, dtype=torch.float64),
            counts=torch.zeros(count, 2, dtype=torch.float64),
            special=torch.tensor(special),
            ends=torch.full((structure.layers,), special),
        )
        self.ids: torch.Tensor | None = None
        """Token ids [batch, time] of the forward; needed while the first position or end tokens are special."""
        self.tracking = False
        self.final_spread: torch.Tensor | None = None
        """s(x) [batch, time] of what the last norm read in the last forward, with its gradient."""
        self._seen: set[int] = set()
        self._values: dict[int, torch.Tensor | None] = {}

    def place(self, role: str, layer: int | None) -> int | None:
        """Return the number of a norm, None where the model has no such norm."""
        places = [n for n, norm in enumerate(self.norms) if (norm.role, norm.layer) == (role, layer)]
        return places[0] if places else None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the hooks in place for the length of a `with` block."""
        handles: list[Any] = []
        for number, module in enumerate(self.modules):
            handles.append(module.register_forward_hook(self._norm_hook(number), with_kwargs=True))
        handles += self._value_hooks()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def forward(self, ids: torch.Tensor, tracking: bool) -> Iterator[None]:
        """Tell of the tokens of a forward; with `tracking` it counts to the step's mean of s(x)."""
        self.ids, self.tracking = ids, tracking
        self._seen.clear()
        try:
            yield
        finally:
            self.tracking = False

    def throw(self, number: int, switch: int | None = None) -> None:
        """Throw the switches of a norm, or one of the two."""
        if switch is None:
            self.state.fake[number] = True
        else:
            self.state.fake[number, switch] = True

    def forget_step(self) -> None:
        """Drop what the step has counted so far."""
        self.state.sums.zero_()
        self.state.counts.zero_()

    def end_step(self, momentum: float) -> None:
        """Let sigma follow the step, where it is not locked: sigma <- momentum sigma + (1 - momentum) mean s."""
        state = self.state
        free = ~state.fake.any(1, keepdim=True) & (state.counts > 0)
        mean = state.sums / state.counts.clamp(min=1)
        state.sigma.copy_(torch.where(free, momentum * state.sigma + (1 - momentum) * mean, state.sigma))
        self.forget_step()

    def measure(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the spread over all positions but the first, and over the first, all channels at once [norms, 2].

        Args:
            ids: Token ids [batch, time] of a sample.
        """
        caught: list[tuple[int, torch.Tensor]] = []

        def catch(number: int) -> Any:
            return lambda _module, arguments, keywords, _output: caught.append((number, _states(arguments, keywords)))

        handles = [
            module.register_forward_hook(catch(number), with_kwargs=True) for number, module in enumerate(self.modules)
        ]
        try:
            with torch.no_grad(), self.forward(ids, tracking=False):
                self.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        found = torch.ones_like(self.state.sigma)
        for number, states in caught:
            first, rest = (states[:, :1], states[:, 1:]) if self._by_position(states, ids) else (states, states)
            for column, part in ((REST, rest), (FIRST, first)):
                found[number, column] = float(spread(part.reshape(1, -1), self.centres, self.eps))
        return found

    def _by_position(self, states: torch.Tensor, ids: torch.Tensor | None) -> bool:
        # Norms on heads have another layout, and no position of their own.
        return ids is not None and states.shape[:-1] == ids.shape and states.shape[1] > 1

    def _norm_hook(self, number: int) -> Any:
        norm, state = self.norms[number], self.state

        def hook(module: torch.nn.Module, arguments: Any, keywords: Any, output: torch.Tensor) -> torch.Tensor | None:
            states = _states(arguments, keywords)
            if self.tracking and number not in self._seen:
                # Activations that are computed again in the backward count once.
                self._seen.add(number)
                self._track(number, states)
            if norm.role == FINAL:
                self.final_spread = spread(states, self.centres, self.eps)
            others, values = (bool(thrown) for thrown in state.fake[number])
            made = self._constant(number, module, states, output, False) if others else None
            if norm.role == SPLIT:
                self._values[int(norm.layer or 0)] = self._for_values(number, module, states, output, others, values)
            return made

        return hook

    def _for_values(
        self,
        number: int,
        module: torch.nn.Module,
        states: torch.Tensor,
        output: torch.Tensor,
        others: bool,
        values: bool,
    ) -> torch.Tensor | None:
        """Return what values read where that is something else than what queries and keys read."""
        ends = bool(self.state.ends[int(self.norms[number].layer or 0)])
        if others != values:
            return self._constant(number, module, states, output, ends) if values else output
        if values and ends:
            return self._constant(number, module, states, output, True)
        return None

    def _track(self, number: int, states: torch.Tensor) -> None:
        with torch.no_grad():
            values = spread(states, self.centres, self.eps).double()
            state = self.state
            if bool(state.special) and self._by_position(states, self.ids):
                parts = ((FIRST, values[:, :1]), (REST, values[:, 1:]))
            else:
                parts = ((REST, values), (FIRST, values))
            for column, part in parts:
                state.sums[number, column] += part.sum().cpu()
                state.counts[number, column] += part.numel()

    def _constant(
        self, number: int, module: torch.nn.Module, states: torch.Tensor, output: torch.Tensor, ends: bool
    ) -> torch.Tensor:
        """Return the output of a norm that divides by its constant."""
        sigma = self.state.sigma[number]
        divisor: float | torch.Tensor = float(sigma[REST])
        if bool(self.state.special) and self._by_position(states, self.ids):
            assert self.ids is not None
            marked = torch.zeros_like(self.ids, dtype=torch.bool)
            marked[:, 0] = True
            if ends:
                marked |= self.ids == self.end_id
            pair = sigma.to(device=states.device, dtype=torch.float32)
            divisor = torch.where(marked, pair[FIRST], pair[REST])[..., None]
        wide = states.float()
        wide = wide - wide.mean(-1, keepdim=True) if self.centres else wide
        gain = module.get_parameter("weight").float() + self.offset
        made = wide / divisor * gain
        bias = getattr(module, "bias", None)
        if bias is not None:
            made = made + bias.float()
        return made.to(output.dtype)

    def _value_hooks(self) -> list[Any]:
        """Return hooks that let values read their own version of a norm's output."""
        structure = self.structure
        if not any(norm.role == SPLIT for norm in self.norms):
            return []
        handles = []
        config = self.model.config.get_text_config().to_dict()
        for tensor in structure.tensors:
            if tensor.part != "weight" or tensor.layer is None:
                continue
            module = self.model.get_submodule(tensor.module)
            if tensor.role == "attn.v":
                handles.append(module.register_forward_pre_hook(self._replace_input(tensor.layer), with_kwargs=True))
            elif tensor.role == "attn.qkv":
                outputs = tensor.shape[1] if tensor.transposed else tensor.shape[0]
                rows = value_rows(structure, config, outputs)
                handles.append(module.register_forward_hook(self._replace_output(tensor.layer, outputs, rows)))
        return handles

    def _replace_input(self, layer: int) -> Any:
        def hook(_module: torch.nn.Module, arguments: Any, keywords: Any) -> Any:
            own = self._values.get(layer)
            return None if own is None else ((own, *arguments[1:]), keywords)

        return hook

    def _replace_output(self, layer: int, outputs: int, rows: Sequence[int]) -> Any:
        mask = torch.zeros(outputs, dtype=torch.bool)
        mask[list(rows)] = True

        def hook(module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
            own = self._values.get(layer)
            if own is None:
                return None
            # Not the module itself: its hooks would run again.
            return torch.where(mask.to(output.device), module.forward(own), output)

        return hook


def _states(arguments: Any, keywords: Any) -> torch.Tensor:
    value: torch.Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return value
