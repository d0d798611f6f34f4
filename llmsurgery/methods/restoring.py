"""Entries of a fine-tuned model that go back to the aligned one: which, in steps, and what is left of the others.

With theta the model, a the aligned and b the fine-tuned one, v a direction and h the residual stream after the searched
blocks at the last token of a prompt:

    loss       sum over batches of -cos(mean of h over the batch, v)
    restore    of the entries with theta = b, b != a, g != 0 and sign(b - a) = sign(g) the k with the largest |g|
    roll back  of the entries restored in this step with sign(a - b) = sign(g') the share with the largest |g'|

Every entry is a's or b's at any time, so that a bit per entry is all there is to know. Nothing but the gradients, in
float32, has the size of the searched blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded
    from llmsurgery.methods.base import Operation

Chosen = dict[int, "torch.Tensor"]
"""Number of a tensor -> flat indices, ascending."""


def may_restore(
    own: torch.Tensor, aligned: torch.Tensor, gradient: torch.Tensor, sign_rule: bool = True
) -> torch.Tensor:
    """Return which entries differ and would lower the loss by going back.

    Args:
        own: Values of the model.
        aligned: Values of the aligned model.
        gradient: Gradient of the loss.
        sign_rule: Look at the gradient; without it every entry that differs may go back.
    """
    differs = own != aligned
    if not sign_rule:
        return differs
    return differs & (gradient != 0) & ((own - aligned).sign() == gradient.sign())


def direction_loss(states: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return -cos of the mean state of a batch and a direction.

    Args:
        states: States of a batch [prompts, width].
        direction: The direction [width].
    """
    from torch.nn import functional

    return -functional.cosine_similarity(states.float().mean(0), direction.to(states.device).float(), dim=0)


def batch_states(
    model: PreTrainedModel, structure: Structure, prompts: Sequence[Encoded], pad_id: int, block: int
) -> torch.Tensor:
    """Return the residual stream after a block at the last token [prompts, width]; gradients flow."""
    import torch

    from llmsurgery.compute.blocks import residual_after
    from llmsurgery.data.collate import collate

    batch = collate(prompts, pad_id, model.device)
    states = residual_after(model, structure, block, batch.input_ids, batch.attention_mask)
    last = batch.attention_mask.sum(1) - 1
    return states[torch.arange(len(prompts), device=states.device), last]


def parameter_of(model: PreTrainedModel, target: RoleTensor) -> torch.nn.Parameter:
    """Return the parameter that holds a stored tensor; of a routed expert that of all experts of its block."""
    name = target.part if target.fused is None else target.fused.parameter
    found: torch.nn.Parameter = model.get_submodule(target.module).get_parameter(name)
    return found


def part_of(values: torch.Tensor, target: RoleTensor) -> torch.Tensor:
    """Return the part of a parameter's values, or of its gradient, that is a stored tensor."""
    if target.fused is None:
        return values
    return values[target.expert].chunk(target.fused.blocks)[target.fused.block]


def batches(prompts: Sequence[Encoded], size: int) -> list[Sequence[Encoded]]:
    """Cut prompts into batches, in the order of the file: gradients depend on which prompts share a batch."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


@dataclass
class Restoration:
    """A model on its way back.

    Attributes:
        operation: What the method is given; its model is changed.
        targets: The tensors that may change.
        block: The last searched block.
        sign_rule: As for `may_restore`.
        restored: Which entries are the aligned model's, one flat mask per tensor.
    """

    operation: Operation
    targets: Sequence[RoleTensor]
    block: int
    sign_rule: bool = True
    restored: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with the fine-tuned model."""
        import torch

        self.restored = [torch.zeros(target.parameters, dtype=torch.bool) for target in self.targets]
        self.gradients: dict[int, torch.Tensor] = {}

    def own(self, target: RoleTensor) -> torch.Tensor:
        """Return the fine-tuned model's values, flat, float32."""
        return flat(self.operation.read(target.stored))

    def aligned(self, target: RoleTensor) -> torch.Tensor:
        """Return the aligned model's values, flat, float32."""
        return flat(self.operation.models["aligned"].read(target.stored))

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Let the searched parameters have gradients, which are added up in float32 beside them."""
        model = self.operation.model
        parameters = list({id(p): p for p in (parameter_of(model, target) for target in self.targets)}.values())
        handles = []
        for parameter in parameters:
            parameter.requires_grad_(True)
            # Without types in torch's stubs.
            register: Any = parameter.register_post_accumulate_grad_hook
            handles.append(register(self._keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _keep(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        found = self.gradients.get(id(parameter))
        if found is None:
            self.gradients[id(parameter)] = gradient.float()
        else:
            found.add_(gradient)
        parameter.grad = None

    def gradient(self, target: RoleTensor) -> torch.Tensor:
        """Return what has been added up for a tensor, flat, float32, on the CPU."""
        import torch

        found = self.gradients.get(id(parameter_of(self.operation.model, target)))
        if found is None:
            return torch.zeros(target.parameters)
        return part_of(found, target).reshape(-1).cpu()

    def add_gradients(self, prompts: Sequence[Encoded], direction: torch.Tensor, size: int) -> float:
        """Add the gradients of the loss of some prompts, and return the mean loss of a batch."""
        import torch

        operation, parts = self.operation, batches(prompts, size)
        total = 0.0
        for part in parts:
            states = batch_states(operation.model, operation.structure, part, operation.encoder.pad_id, self.block)
            loss = direction_loss(states, direction)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return total / len(parts)

    def restore(self, count: int) -> Chosen:
        """Restore so many entries at most, all tensors ranked together, and return which."""
        from llmsurgery.compute.largest import Largest

        largest = Largest(count)
        for number, target in enumerate(self.targets):
            gradient = self.gradient(target)
            allowed = may_restore(self.own(target), self.aligned(target), gradient, self.sign_rule)
            places = (allowed & ~self.restored[number]).nonzero().flatten()
            largest.add(number, gradient[places].abs(), places)
        chosen = {number: largest.of(number) for number in range(len(self.targets))}
        chosen = {number: places for number, places in chosen.items() if len(places)}
        self.move(chosen, back=True)
        return chosen

    def roll_back(self, chosen: Chosen, share: float) -> int:
        """Give some of the entries that were just restored to the fine-tuned model again, and return how many."""
        from llmsurgery.compute.largest import Largest

        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for number, places in chosen.items():
            target = self.targets[number]
            gradient = self.gradient(target)[places]
            away = may_restore(self.aligned(target)[places], self.own(target)[places], gradient)
            found[number] = gradient[away].abs(), places[away]
        count = math.ceil(share * sum(len(places) for _, places in found.values()))
        largest = Largest(count)
        for number, (values, places) in found.items():
            largest.add(number, values, places)
        given = {number: largest.of(number) for number in found}
        self.move(given, back=False)
        return count

    def move(self, chosen: Mapping[int, torch.Tensor], back: bool) -> None:
        """Set entries to the aligned model's values, or to the fine-tuned one's."""
        import torch

        from llmsurgery.compute.view import weight_view

        for number, places in chosen.items():
            if not len(places):
                continue
            target = self.targets[number]
            values = (self.aligned(target) if back else self.own(target))[places]
            view = weight_view(self.operation.model, target)
            with torch.no_grad():
                view.view(-1)[places.to(view.device)] = values.to(view.device, view.dtype)
            self.restored[number][places] = back

    def show(self, masks: Sequence[torch.Tensor]) -> None:
        """Set the model to another state of the search."""
        self.move({n: (now & ~mask).nonzero().flatten() for n, (now, mask) in self._pairs(masks)}, back=False)
        self.move({n: (mask & ~now).nonzero().flatten() for n, (now, mask) in self._pairs(masks)}, back=True)

    def _pairs(self, masks: Sequence[torch.Tensor]) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        yield from enumerate(zip(self.restored, masks, strict=True))

    def entries(self) -> int:
        """Return how many entries are the aligned model's."""
        return sum(int(mask.sum()) for mask in self.restored)


def flat(values: npt.NDArray[np.floating]) -> torch.Tensor:
    """Return a stored tensor as a flat float32 tensor."""
    import torch

    return torch.from_numpy(values.astype("float32", copy=False)).reshape(-1)


@dataclass(frozen=True)
class Packed:
    """A state of the search, eight entries a byte."""

    masks: tuple[npt.NDArray[np.uint8], ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, masks: Sequence[torch.Tensor]) -> Packed:
        """Keep masks."""
        import numpy as np

        return cls(tuple(np.packbits(mask.numpy()) for mask in masks), tuple(len(mask) for mask in masks))

    def unpacked(self) -> list[torch.Tensor]:
        """Return the masks."""
        import numpy as np
        import torch

        return [
            torch.from_numpy(np.unpackbits(mask, count=size).astype(bool))
            for mask, size in zip(self.masks, self.sizes, strict=True)
        ]
