"""Magnitude pruning: zero the smallest weights of every matrix. It needs no data.

The baseline of "A Simple and Effective Pruning Approach for LLMs", arXiv 2306.11695. In each matrix of a block the
floor(s * entries) entries of smallest |W| become zero, or with --pattern N:M the N smallest of every M consecutive
inputs of a row. The other weights keep their bytes.

--sparsity is of the matrices that are pruned; embeddings, norms, routers and the head stay dense. --of all counts it
against all parameters. The zeros are stored densely: neither the file nor inference becomes smaller or faster without
a runtime for sparse weights.

What differs from the released code (locuslab/wanda), and why:

- It zeroes every |W| <= the threshold at index floor(s * entries) of the sorted values: one more than asked, and all
  ties besides, of which weights in bf16 have many. Here it is exactly floor(s * entries), by index among equals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.amounts import AmountConfig, amount_of, pruned_tensors
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.pruning import (
    magnitude_mask,
    prune_each,
    pruned_result,
)
from llmsurgery.methods.registry import register

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class MagnitudeConfig:
    """Hyperparameters of magnitude pruning; `llmsurgery methods magnitude` prints them with their help."""

    amount: AmountConfig = field(default_factory=AmountConfig)


@register
class Magnitude:
    """Magnitude pruning as a method of the toolkit."""

    spec = MethodSpec(
        name="magnitude",
        task="prune",
        summary="zero the smallest weights of every matrix, without data",
        paper="A Simple and Effective Pruning Approach for LLMs (baseline), arXiv 2306.11695",
        needs=(),
        export="plain",
        trained=False,
        walks=True,
    )
    config_type = MagnitudeConfig

    def plan(self, config: MagnitudeConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that are pruned.

        Raises:
            UsageError: The amount does not fit the model.
        """
        targets = pruned_tensors(config.amount, structure)
        amount_of(config.amount, structure, targets)
        return targets

    def prepare(self, config: MagnitudeConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No data are needed."""

    def edit(self, config: MagnitudeConfig, operation: Operation, prepared: None) -> MethodResult:
        """Zero the smallest weights."""
        targets = pruned_tensors(config.amount, operation.structure)
        amount = amount_of(config.amount, operation.structure, targets)
        pruned = prune_each(operation, targets, lambda _target, weight, _none: magnitude_mask(weight, amount))
        return pruned_result(operation, config.amount, amount, targets, pruned, {})
