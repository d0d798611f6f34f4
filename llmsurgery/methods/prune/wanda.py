"""Wanda: zero the weights whose product with the size of their input is smallest, row by row.

Paper: "A Simple and Effective Pruning Approach for LLMs", arXiv 2306.11695. With X [tokens, inputs] what enters a
matrix W [outputs, inputs] on the calibration text:

    S_ij = |W_ij| * sqrt(sum_t X_tj^2)

In each row the floor(s * inputs) entries of smallest S become zero, or with --pattern N:M the N smallest of every M
consecutive inputs. Blocks are pruned in order, and each sees what the pruned ones before it put out; within a block
all inputs are those from before it is pruned. The other weights keep their bytes.

--sparsity is of the matrices that are pruned; --of all counts it against all parameters. The zeros are stored densely:
neither the file nor inference becomes smaller or faster without a runtime for sparse weights. An expert that no token
of the calibration text reaches, and a matrix whose inputs are all zero, are pruned by magnitude, and that is recorded.
variant=true is the paper's other rule: per row, S is sorted and entries go as long as their sum stays within alpha
times the row's total; alpha is found by bisection so that the matrix has the sparsity asked for, to 0.001.

A killed run goes on behind the last pruned block with --resume. `--set eval.figures=streamed` prunes and measures with
one block in memory, for models that do not fit.

What differs from the released code (locuslab/wanda), and why:

- It hands three named arguments on to a block; here everything that the stock model calls a block with goes with it,
  so that sliding windows and position embeddings that differ by layer are right.
- Windows hold no padding, and so no padded token counts. Text shorter than the windows asked for is used as it is.
- The variant zeroes one entry more than asked in its threshold; ties are decided by index here, in all rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.errors import DivergedError, UsageError
from llmsurgery.methods.amounts import Amount, AmountConfig, amount_of, pruned_tensors
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.pruning import (
    CalibrationConfig,
    calibration_windows,
    magnitude_mask,
    prune_blocks,
    pruned_result,
    tell_of_windows,
)
from llmsurgery.methods.registry import register
from llmsurgery.methods.working_memory import Working, block_bytes, masking_bytes, walking
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.inputs import SquareSum
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.data.windows import Window

TOLERANCE = 0.001
"""How near the variant's sparsity must come to the one asked for."""


@dataclass(frozen=True)
class WandaConfig:
    """Hyperparameters of Wanda; `llmsurgery methods wanda` prints them with their help."""

    amount: AmountConfig = field(default_factory=AmountConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    variant: bool = option(False, "share the zeros out among rows by cumulated scores instead of evenly")


@register
class Wanda:
    """Wanda as a method of the toolkit."""

    spec = MethodSpec(
        name="wanda",
        task="prune",
        summary="zero weights by magnitude times the size of their inputs, row by row",
        paper="A Simple and Effective Pruning Approach for LLMs, arXiv 2306.11695",
        needs=(),
        uses=("calibration",),
        export="plain",
        trained=False,
        walks=True,
        presets={"paper": {"samples": 128, "window": 2048}},
    )
    config_type = WandaConfig

    def plan(self, config: WandaConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that are pruned.

        Raises:
            UsageError: The amount does not fit the model.
        """
        targets = pruned_tensors(config.amount, structure)
        amount = amount_of(config.amount, structure, targets)
        if config.variant and amount.group is not None:
            raise UsageError("a pattern has no variant", "it decides how many zeros a row gets", "drop one of them")
        return targets

    def prepare(self, config: WandaConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> list[Window]:
        """Cut the calibration text into windows."""
        return calibration_windows(config.calibration, encoder, data["calibration"])

    def working(
        self, config: WandaConfig, structure: Structure, prepared: list[Window], rows: int | None
    ) -> list[Working]:
        """Return what is held beside the model: the masks of a block, and one of them being made."""
        targets = pruned_tensors(config.amount, structure)
        held = masking_bytes(targets) + block_bytes(targets, {})
        return [walking("pruning", prepared, rows, held)]

    def edit(self, config: WandaConfig, operation: Operation, prepared: list[Window]) -> MethodResult:
        """Prune block by block."""
        from llmsurgery.compute.inputs import SquareSum

        tell_of_windows(operation, config.calibration, prepared, "calibration")
        targets = pruned_tensors(config.amount, operation.structure)
        amount = amount_of(config.amount, operation.structure, targets)
        unseen: list[str] = []
        device = operation.model.device

        def prune(target: RoleTensor, weight: torch.Tensor, statistic: SquareSum) -> torch.Tensor:
            if not bool((statistic.sum > 0).any()):
                unseen.append(target.stored)
                return magnitude_mask(weight, amount)
            return wanda_mask(scores(weight, statistic, target.stored), amount, config.variant)

        pruned = prune_blocks(operation, targets, prepared, lambda size: SquareSum(size, device), prune)
        if unseen:
            operation.progress.notice(f"{len(unseen)} matrices saw no input and were pruned by magnitude: {unseen[0]}")
        record = {"windows": len(prepared), "window_tokens": len(prepared[0]), "by_magnitude": unseen}
        return pruned_result(operation, config.amount, amount, targets, pruned, record)


def scores(weight: torch.Tensor, statistic: SquareSum, name: str) -> torch.Tensor:
    """Return S [outputs, inputs].

    Args:
        weight: W [outputs, inputs].
        statistic: Of its inputs.
        name: The matrix, for the message.

    Raises:
        DivergedError: An input is NaN or infinite.
    """
    result = weight.abs() * statistic.sum.sqrt()
    if not bool(result.isfinite().all()):
        raise DivergedError(
            f"the inputs of {name} are NaN or infinite",
            "an activation does not fit into the compute dtype",
            "use --dtype float32 or bfloat16",
        )
    return result


def wanda_mask(score: torch.Tensor, amount: Amount, variant: bool = False) -> torch.Tensor:
    """Mark the entries of smallest score [outputs, inputs] in each row, or in each group of a pattern."""
    from llmsurgery.compute.select import smallest_of_groups, smallest_share

    if amount.group is not None:
        return smallest_of_groups(score, *amount.group)
    return variant_mask(score, amount.share) if variant else smallest_share(score, amount.share)


def variant_mask(score: torch.Tensor, share: float) -> torch.Tensor:
    """Mark, in each row, the smallest entries whose sum stays within alpha of the row's total.

    Args:
        score: S [outputs, inputs].
        share: Share of the matrix that is to be marked; alpha, between 0 and 0.8, is found by bisection from 0.4.
    """
    import torch

    order = torch.argsort(score, dim=1, stable=True)
    running = score.gather(1, order).cumsum(1)
    low, high, alpha = 0.0, 0.8, 0.4
    for _ in range(60):
        marked = running <= alpha * running[:, -1:]
        found = float(marked.float().mean())
        if abs(found - share) <= TOLERANCE:
            break
        low, high = (low, alpha) if found > share else (alpha, high)
        alpha = (low + high) / 2
    return torch.zeros_like(marked).scatter(1, order, marked)
