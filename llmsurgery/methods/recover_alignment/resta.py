"""resta: add the vector that leads from an unaligned model to the aligned one.

Paper: RESTA, "Language Models are Homer Simpson!", arXiv 2402.11746. With a the aligned, b the fine-tuned and u the
unaligned model, in every matrix of the blocks:

    result = b + gamma (a - u)

With dare > 0 the fine-tuning is thinned first (DARE, arXiv 2311.03099): each entry of b - a is kept with the
probability 1 - dare and then divided by it.

The unaligned model is the user's own. The paper makes it by fine-tuning the aligned model on harmful answers; nothing
in this toolkit ever trains a model towards harm. The paper is known here by its abstract and its README alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.recovering import (
    computed_edits,
    controls,
    last_held,
    moved_tensors,
    other_values,
    own_values,
    stored_only,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class RestaConfig:
    """Hyperparameters of resta; `llmsurgery methods resta` prints them with their help."""

    gamma: float = option(0.5, "length of the step along a - u; above 0", minimum=0, maximum=2)
    dare: float = option(0.0, "share of the fine-tuning's entries that is dropped first", minimum=0, maximum=0.99)
    roles: tuple[str, ...] = option(("linear",), "roles that move; as for training")
    layers: tuple[int, ...] = option((), "layers that move; empty: all")
    controls: bool = option(True, "measure a random restoration and an interpolation of the same size")


@register
class Resta:
    """resta as a method of the toolkit."""

    spec = MethodSpec(
        name="resta",
        task="recover-alignment",
        summary="add the difference of the aligned model and an unaligned one of the user's own",
        paper="Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through Task "
        "Arithmetic, arXiv 2402.11746",
        needs=(),
        uses=("harmful", "task"),
        export="plain",
        trained=False,
        selects=True,
        models=("aligned", "unaligned"),
        demo="refuse",
    )
    config_type = RestaConfig

    def plan(self, config: RestaConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may move."""
        return structure.select(config.roles, config.layers or None)

    def prepare(self, config: RestaConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No data is needed.

        Raises:
            UsageError: A step of no length.
        """
        from llmsurgery.errors import UsageError

        if not config.gamma:
            raise UsageError("gamma=0 changes nothing", "it is the length of the step", "use 0.5, or up to 2")

    def edit(self, config: RestaConfig, operation: Operation, prepared: None) -> MethodResult:
        """Add the vector to every matrix."""

        stored = stored_only(operation)

        def moved(target: RoleTensor) -> torch.Tensor:
            aligned = other_values(stored, "aligned", target).double()
            apart = aligned - other_values(stored, "unaligned", target).double()
            own = own_values(stored, target).double()
            kept = _drawn(stored, target) >= config.dare if config.dare else None
            return add_vector(own, aligned, apart, config.gamma, kept, config.dare).float()

        values = last_held(moved)
        changed, removed, entries = moved_tensors(operation, self.plan(config, operation.structure), values)
        record: dict[str, object] = {
            "controls": controls(operation, changed, removed, entries, config.controls, dense=True)
        }
        return MethodResult(computed_edits(changed, values), record, changed)


def _drawn(operation: Operation, target: RoleTensor) -> torch.Tensor:
    """Return random numbers for the entries of a tensor, the same whenever they are asked for."""
    import torch

    # A seed of its own for every tensor: values are computed again when they are written.
    seed = random.Random(f"{operation.seed} {target.stored}").getrandbits(63)
    return torch.rand(target.shape, generator=torch.Generator().manual_seed(seed))


def add_vector(
    own: torch.Tensor,
    aligned: torch.Tensor,
    apart: torch.Tensor,
    gamma: float,
    kept: torch.Tensor | None = None,
    dare: float = 0.0,
) -> torch.Tensor:
    """Return b + gamma (a - u), with the fine-tuning thinned first if entries to keep are given.

    Args:
        own: b.
        aligned: a.
        apart: a - u.
        gamma: Length of the step.
        kept: Which entries of b - a are kept.
        dare: Share that was dropped.
    """
    if kept is not None:
        own = aligned + (own - aligned) * kept / (1 - dare)
    return own + gamma * apart
