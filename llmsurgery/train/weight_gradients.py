"""Gradients of weight matrices that are handed over as soon as they exist and freed at once.

At no moment are the gradients of two parameters held: a backward pass takes the weights, the activations and one
gradient. (LOMO, arXiv 2306.09782, updates weights this way; here nothing is updated.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor
from llmsurgery.compute.head import batch_log_probabilities
from llmsurgery.errors import DivergedError

Receive = Callable[[RoleTensor, torch.Tensor], None]
"""Takes a matrix and its gradient [outputs, inputs] in the compute dtype, which is gone afterwards."""


@contextmanager
def handed_gradients(model: PreTrainedModel, targets: Sequence[RoleTensor], receive: Receive) -> Iterator[None]:
    """Hand the gradients of matrices over, one parameter at a time, in the backward passes inside a `with` block.

    Args:
        model: A loaded model, none of whose parameters needs a gradient; so it is left.
        targets: Matrices, routed experts among them.
        receive: Takes each gradient.
    """
    places: dict[tuple[str, str], list[RoleTensor]] = defaultdict(list)
    for target in targets:
        places[target.module, target.fused.parameter if target.fused else target.part].append(target)
    parameters = [model.get_submodule(path).get_parameter(name) for path, name in places]

    def taking(members: Sequence[RoleTensor]) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            for target in members:
                receive(target, _part(gradient, target))

        return hook

    handles = []
    for parameter, members in zip(parameters, places.values(), strict=True):
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(taking(members)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _part(gradient: torch.Tensor, target: RoleTensor) -> torch.Tensor:
    """Return the gradient of a stored matrix, [outputs, inputs], out of that of its parameter."""
    if target.fused is not None:
        return gradient[target.expert].chunk(target.fused.blocks)[target.fused.block]
    return gradient.T if target.transposed else gradient


def text_backward(model: PreTrainedModel, ids: torch.Tensor, scale: float = 1.0) -> float:
    """Run a backward pass of the mean negative log-likelihood of all tokens of a batch but the first of each row.

    Args:
        model: A loaded model in eval mode.
        ids: Token ids [rows, time] without padding.
        scale: What the loss is multiplied with before the backward pass.

    Returns:
        The loss, nats per token, without the scale.

    Raises:
        DivergedError: It is NaN or infinite.
    """
    ids = ids.to(model.device)
    labelled = torch.ones_like(ids, dtype=torch.bool)
    labelled[:, 0] = False
    scores, _ = batch_log_probabilities(model, ids, torch.ones_like(ids), labelled)
    loss = -scores.mean()
    value = float(loss.detach())
    if not torch.isfinite(loss.detach()):
        raise DivergedError(
            f"the loss on a window is {value}", "the model diverges on this text", "use --dtype float32"
        )
    torch.autograd.backward(loss * scale)
    return value
