"""Squared gradients of linear layers: the diagonal of the empirical Fisher information, in one streaming pass.

The weights need no gradient of their own. A layer's gradient on some rows is the product of its outputs' gradients and
its inputs, which hooks catch; so rows of one forward give squared gradients each by itself, and beside the maps no
gradient of a weight outlives its layer's turn in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import label_log_probabilities, labelled_hidden, read_head
from llmsurgery.compute.progress import Tick
from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import Batch, collate
from llmsurgery.train.pooling import row_means

Receive = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Takes a module's path, its inputs and the gradient of its outputs, each with the rows of the batch first."""


def squared_gradients(
    model: PreTrainedModel,
    modules: Sequence[str],
    rows: Sequence[Encoded],
    pad_id: int,
    unit: int,
    micro_batch: int,
    tick: Tick,
) -> dict[str, torch.Tensor]:
    """Return the mean squared gradient of some linear layers.

    With g_b the gradient of the mean negative log-likelihood of the labelled tokens of unit b, a unit being n_b rows
    that follow each other: I = sum_b n_b g_b^2 / sum_b n_b, elementwise. Units of one row give the diagonal of the
    empirical Fisher information; larger ones square the gradient of a batch, which is another, smaller quantity.

    Args:
        model: A model without trainable weights.
        modules: Paths of linear layers; each is called once in a forward.
        rows: Encoded rows.
        pad_id: Token id for padding.
        unit: Rows per unit.
        micro_batch: Rows per forward; at least one unit goes through at once.
        tick: Told of every row.

    Returns:
        Module path -> fp32 map [outputs, inputs], whatever the orientation of the stored weight.
    """
    maps: dict[str, torch.Tensor] = {}

    def receive(units: int, size: int) -> Receive:
        def add(name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
            # Some layers see the rows of a batch flattened into one.
            values = inputs.reshape(units, -1, inputs.shape[-1])
            slopes = gradient.reshape(units, -1, gradient.shape[-1])
            if name not in maps:
                maps[name] = torch.zeros(slopes.shape[-1], values.shape[-1], device=slopes.device)
            for value, slope in zip(values, slopes, strict=True):
                whole = slope.float().T @ value.float()
                maps[name].addcmul_(whole, whole, value=size)

        return add

    for group in _forwards(len(rows), unit, micro_batch):
        batch = collate([rows[i] for i in group], pad_id, model.device)
        size = min(unit, len(group))
        with caught(model, modules, receive(len(group) // size, size)):
            units_backward(model, batch, size)
        tick(len(group))
    return {name: total / len(rows) for name, total in maps.items()}


def _forwards(rows: int, unit: int, micro_batch: int) -> Iterator[range]:
    """Yield the rows of each forward: whole units of one size, a shorter last unit by itself."""
    whole = rows - rows % unit
    step = max(unit, micro_batch - micro_batch % unit)
    for start in range(0, whole, step):
        yield range(start, min(start + step, whole))
    if whole < rows:
        yield range(whole, rows)


def units_backward(model: PreTrainedModel, batch: Batch, size: int) -> None:
    """Run a backward pass of the sum over units of their mean negative log-likelihoods.

    Args:
        model: A model without trainable weights, some of whose layers are being `caught`.
        batch: Rows; whole units.
        size: Rows of a unit.
    """
    hidden, owners, labels = labelled_hidden(model, batch.input_ids, batch.attention_mask, batch.label_mask)
    scores = label_log_probabilities(hidden, read_head(model), labels)
    losses = row_means(-scores, owners // size, len(batch.input_ids) // size)
    torch.autograd.backward(losses.sum())


@contextmanager
def caught(model: PreTrainedModel, modules: Sequence[str], catch: Receive) -> Iterator[None]:
    """Hand over what a backward pass inside a `with` block tells of some linear layers.

    Args:
        model: A model without trainable weights.
        modules: Their paths; each is called once in a forward.
        catch: Takes inputs and gradients of one of them.
    """

    def receive(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        first, *others = inputs
        # The lowest layers would otherwise be cut off the graph: nothing below them moves.
        return (first if first.requires_grad else first.detach().requires_grad_(), *others)

    def watch(name: str) -> list[torch.utils.hooks.RemovableHandle]:
        def after(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            kept = inputs[0].detach()
            register: Any = output.register_hook
            register(lambda gradient: catch(name, kept, gradient))

        module = model.get_submodule(name)
        return [module.register_forward_pre_hook(receive), module.register_forward_hook(after)]

    handles = [handle for name in modules for handle in watch(name)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def group_modules(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Cut modules into groups whose maps fit into memory together.

    Args:
        sizes: Module path -> bytes that its maps take.
        limit: Bytes of a group; a module that takes more is a group by itself.
    """
    group: list[str] = []
    used = 0
    for name, size in sizes.items():
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group
