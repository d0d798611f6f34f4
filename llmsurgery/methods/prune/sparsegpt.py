"""SparseGPT: zero the weights that are cheapest to lose, and let the rest of their row make up for each.

Paper: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774. With x what enters
a matrix W [outputs, inputs] on the calibration text, H = sum x x^T + 0.01 mean(diag H) I and U the upper Cholesky
factor of its inverse, U^T U = H^-1, for each block of 128 columns, from left to right:

    score = W^2 / U_jj^2                     on the weights as changed so far
    mask  = the s-fraction of smallest score over all rows of the block
    for each column j of it:
        e = (W_:j - W_:j with zeros) / U_jj,    W_:,j.. -= e U_j,j..

With --pattern N:M the mask of every M columns is chosen when they are reached. Blocks of the model are pruned in order,
and each sees what the pruned ones before it put out. All of it is in fp32, rounded once at the end.

--sparsity is of the matrices that are pruned; --of all counts it against all parameters. The zeros are stored densely:
neither the file nor inference becomes smaller or faster without a runtime for sparse weights. Inputs that never fire
lose their column; an expert that no token reaches is pruned by magnitude. Where H has no Cholesky factor the damping
grows tenfold, up to five times; all of this is recorded.

A killed run goes on behind the last pruned block with --resume. `--set eval.figures=streamed` prunes and measures with
one block in memory, for models that do not fit.

What differs from the released code (IST-DASLab/sparsegpt), and why:

- The mask takes exactly the s-fraction of a block. There, scores <= a threshold take one more and all ties.
- Everything that the stock model calls a block with goes with it, not three named arguments.
- Windows hold no padding, which would count in H.
- Conv1D matrices (GPT-2) are turned, so that columns are inputs in every family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.amounts import AmountConfig, amount_of, pruned_tensors
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
from llmsurgery.methods.working_memory import STORED_BYTES, Working, block_bytes, second_moment_bytes, walking
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.accumulate import SecondMoment
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.data.windows import Window


@dataclass(frozen=True)
class SparseGptConfig:
    """Hyperparameters of SparseGPT; `llmsurgery methods sparsegpt` prints them with their help."""

    amount: AmountConfig = field(default_factory=AmountConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    block: int = option(128, "columns that share one mask", minimum=1)
    damping: float = option(0.01, "share of the mean diagonal of H that is added to it", minimum=0)


@register
class SparseGpt:
    """SparseGPT as a method of the toolkit."""

    spec = MethodSpec(
        name="sparsegpt",
        task="prune",
        summary="zero the weights that are cheapest to lose and let the others make up for them",
        paper="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv 2301.00774",
        needs=(),
        uses=("calibration",),
        export="plain",
        trained=False,
        walks=True,
        presets={"paper": {"samples": 128, "window": 2048}},
    )
    config_type = SparseGptConfig

    def plan(self, config: SparseGptConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that are pruned.

        Raises:
            UsageError: The amount does not fit the model.
        """
        targets = pruned_tensors(config.amount, structure)
        amount_of(config.amount, structure, targets)
        return targets

    def prepare(self, config: SparseGptConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> list[Window]:
        """Cut the calibration text into windows."""
        return calibration_windows(config.calibration, encoder, data["calibration"])

    def working(
        self, config: SparseGptConfig, structure: Structure, prepared: list[Window], rows: int | None
    ) -> list[Working]:
        """Return what is held beside the model: second moments of a block, and one of them factorised."""
        targets = pruned_tensors(config.amount, structure)
        held = second_moment_bytes(targets) + block_bytes(targets, STORED_BYTES)
        return [walking("pruning", prepared, rows, held)]

    def edit(self, config: SparseGptConfig, operation: Operation, prepared: list[Window]) -> MethodResult:
        """Prune block by block."""
        from llmsurgery.compute.accumulate import SecondMoment
        from llmsurgery.compute.sparsegpt import Factor, factorise, prune_matrix

        tell_of_windows(operation, config.calibration, prepared, "calibration")
        targets = pruned_tensors(config.amount, operation.structure)
        amount = amount_of(config.amount, operation.structure, targets)
        unseen: list[str] = []
        dampings: dict[str, float] = {}
        dead: dict[str, int] = {}
        device = operation.model.device
        # Queries, keys and values have one H between them, and so one factor.
        last: list[tuple[SecondMoment, Factor]] = []

        def prune(target: RoleTensor, weight: torch.Tensor, moment: SecondMoment) -> torch.Tensor:
            if not bool((moment.sum.diagonal() > 0).any()):
                unseen.append(target.stored)
                return weight.masked_fill(magnitude_mask(weight, amount), 0)
            if not last or last[0][0] is not moment:
                last[:] = [(moment, factorise(moment.sum, config.damping, target.stored))]
            factor = last[0][1]
            if factor.damping != config.damping:
                dampings[target.stored] = factor.damping
            if bool(factor.dead.any()):
                dead[target.stored] = int(factor.dead.sum())
            return prune_matrix(weight, factor, amount.share, amount.group, config.block)

        pruned = prune_blocks(operation, targets, prepared, lambda size: SecondMoment(size, device), prune)
        if unseen:
            operation.progress.notice(f"{len(unseen)} matrices saw no input and were pruned by magnitude: {unseen[0]}")
        if dampings:
            name, value = next(iter(dampings.items()))
            operation.progress.notice(f"damping was raised for {len(dampings)} matrices, to {value:g} for {name}")
        record = {
            "windows": len(prepared),
            "window_tokens": len(prepared[0]),
            "by_magnitude": unseen,
            "raised_damping": dampings,
            "dead_inputs": dead,
        }
        return pruned_result(operation, config.amount, amount, targets, pruned, record)
