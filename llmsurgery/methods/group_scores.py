"""How much the loss depends on heads and channels: scores of groups from weights and gradients (LLM-Pruner)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmsurgery.methods.base import Operation
from llmsurgery.methods.heads_and_channels import KINDS, members

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.data.windows import Window

SCORES = ("param_first", "vectorize", "param_second", "param_mix")
SQUARED = ("param_second", "param_mix")
"""Scores that need the squares of gradients."""


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the highest scores in ascending order; the last among equals."""
    from llmsurgery.compute.select import smallest

    gone = smallest(scores[None], len(scores) - count)[0]
    return (~gone).nonzero()[:, 0]


class Sums:
    """Sums of the gradients of one matrix and of their squares, fp32 [outputs, inputs]."""

    def __init__(self) -> None:
        self.first: Any = 0.0
        self.second: Any = 0.0


def group_scores(
    score: str, operation: Operation, windows: Sequence[Window], counts: Mapping[str, int]
) -> dict[str, dict[int, torch.Tensor]]:
    """Return the scores of the groups, kind of group -> block -> [groups].

    Args:
        score: One of `SCORES`.
        operation: What the method is given.
        windows: The samples; one is one backward pass.
        counts: Kind of group -> number of groups of a block.
    """
    import torch

    from llmsurgery.methods.pruning import stored_matrix
    from llmsurgery.train.weight_gradients import handed_gradients, text_backward

    matrices = {
        name: [t for t in members(operation.structure, roles) if len(t.shape) == 2] for name, roles in KINDS.items()
    }
    sums: dict[str, Sums] = defaultdict(Sums)
    squares = score in SQUARED

    def receive(target: RoleTensor, gradient: torch.Tensor) -> None:
        own = sums[target.stored]
        own.first = own.first + gradient.float()
        if squares:
            own.second = own.second + gradient.float().square()

    every = [target for targets in matrices.values() for target in targets]
    with (
        handed_gradients(operation.model, every, receive),
        operation.progress.task("gradients", len(windows)) as tick,
    ):
        for window in windows:
            text_backward(operation.model, torch.tensor([window]))
            tick()
    result: dict[str, dict[int, torch.Tensor]] = {name: {} for name in matrices}
    for name, targets in matrices.items():
        for target in targets:
            own = sums.pop(target.stored)
            weight = stored_matrix(operation, target)
            terms = entry_terms(score, weight, own.first, own.second / len(windows) if squares else weight)
            added = tensor_score(score, terms, KINDS[name][target.role], counts[name])
            layer = int(target.layer or 0)
            result[name][layer] = result[name].get(layer, 0) + added
    return result


def entry_terms(score: str, weight: torch.Tensor, gradient: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """Return what single entries count, before the absolute value.

    Args:
        score: One of `SCORES`.
        weight: W.
        gradient: Sum of the gradients over samples.
        squared: Mean of the squared gradients over samples.
    """
    if score in ("param_first", "vectorize"):
        return weight * gradient
    second = weight.square() * squared
    return second if score == "param_second" else weight * gradient - second / 2


def tensor_score(score: str, terms: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """Return what one tensor adds to the score of each group [groups].

    Args:
        score: One of `SCORES`.
        terms: Of `entry_terms` [outputs, inputs].
        axis: Axis along which the groups lie.
        groups: Number of groups.
    """
    parts = (terms if axis == 0 else terms.T).reshape(groups, -1)
    return parts.sum(1).abs() if score == "vectorize" else parts.abs().sum(1)
