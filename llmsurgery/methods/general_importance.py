"""How much weights matter for ordinary text, before anything is pruned: what D-Pruner protects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsurgery.methods.amounts import Amount
from llmsurgery.methods.base import Operation
from llmsurgery.methods.pruning import stored_matrix, walk_of

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.data.windows import Window

KINDS = ("activations", "obs", "sequential")


class General:
    """General importance G of matrices.

    activations: |W_ij| ||X_:j||, as Wanda scores; obs: W_ij^2 / [H^-1]_jj on the dense model, the error of one weight
    if all others of its row may make up for it; sequential: W_ij^2 / U_jj^2 as SparseGPT meets it, on weights that
    make up for those to their left and behind pruned blocks, with U^T U = H^-1.

    Args:
        kind: One of `KINDS`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.kept: dict[str, torch.Tensor] = {}

    def of(self, target: RoleTensor, weight: torch.Tensor) -> torch.Tensor:
        """Return G [outputs, inputs] of a matrix W [outputs, inputs]."""
        kept = self.kept[target.stored]
        if self.kind == "activations":
            return weight.abs() * kept
        return weight.square() * kept if self.kind == "obs" else kept


def general_importance(
    operation: Operation,
    kind: str,
    targets: Sequence[RoleTensor],
    windows: Sequence[Window],
    amount: Amount,
    damping: float,
) -> General:
    """Measure general importance in one walk over the blocks; the model is left as it was.

    What is known of a block is kept with the states of the run, so that a killed one goes on behind it; `sequential`
    starts anew, since it goes on with pruned blocks.

    Args:
        operation: What the method is given.
        kind: One of `KINDS`.
        targets: Matrices.
        windows: Ordinary text.
        amount: How much `sequential` prunes on its way.
        damping: Share of the mean diagonal that is added to H.
    """
    from llmsurgery.compute.accumulate import SecondMoment
    from llmsurgery.compute.inputs import SquareSum, Statistic, watched_inputs
    from llmsurgery.compute.view import weight_view
    from llmsurgery.train.state import State

    general = General(kind)
    device = operation.model.device

    def make(size: int) -> Statistic:
        return SquareSum(size, device) if kind == "activations" else SecondMoment(size, device)

    by_layer: dict[int, list[RoleTensor]] = defaultdict(list)
    for target in targets:
        by_layer[int(target.layer or 0)].append(target)
    last, store = max(by_layer), None if kind == "sequential" else operation.training.store
    earlier = {layer: state for layer in by_layer if store is not None and (state := store.load(layer)) is not None}
    for state in earlier.values():
        general.kept |= {name: values.to(device) for name, values in state.tensors.items()}
    if len(earlier) == len(by_layer):
        return general
    walk = walk_of(operation, windows)
    with operation.progress.task("general importance", last + 1) as tick:
        for layer in range(last + 1):
            members = by_layer.get(layer, [])
            with walk.held():
                if layer in earlier:
                    walk.advance()
                    tick()
                    continue
                with watched_inputs(operation.model, operation.structure, members, make) as statistic:
                    if kind == "sequential":
                        walk.look()
                    else:
                        walk.advance()
                for target in members:
                    made = _measure(general, operation, target, statistic(target), amount, damping)
                    if made is not None:
                        view = weight_view(operation.model, target)
                        view.copy_(made.T if target.transposed else made)
                if store is not None and members:
                    kept = {target.stored: general.kept[target.stored] for target in members}
                    store.save(layer, State({"step": 1}, kept))
                if kind == "sequential":
                    walk.advance()
                    for target in members:
                        weight = stored_matrix(operation, target)
                        view = weight_view(operation.model, target)
                        view.copy_(weight.T if target.transposed else weight)
            tick()
    return general


def _measure(
    general: General, operation: Operation, target: RoleTensor, statistic: object, amount: Amount, damping: float
) -> torch.Tensor | None:
    """Keep what G of a matrix is made of; return the pruned matrix if the walk goes on with it."""
    import torch

    from llmsurgery.compute.accumulate import SecondMoment
    from llmsurgery.compute.inputs import SquareSum
    from llmsurgery.compute.sparsegpt import factorise, prune_matrix

    if isinstance(statistic, SquareSum):
        general.kept[target.stored] = statistic.sum.sqrt()
        return None
    assert isinstance(statistic, SecondMoment)
    factor = factorise(statistic.sum, damping, target.stored)
    if general.kind == "obs":
        # The diagonal of H^-1 = U^T U.
        general.kept[target.stored] = factor.upper.square().sum(0).reciprocal()
        return None
    weight = stored_matrix(operation, target)
    scores = torch.empty_like(weight)

    def keep(start: int, part: torch.Tensor) -> None:
        scores[:, start : start + part.shape[1]] = part

    made = prune_matrix(weight, factor, amount.share, amount.group, observe=keep)
    general.kept[target.stored] = scores
    return made
