"""Fold: move the gains and biases of norms into the matrices that read them. The model computes what it did.

The folding step of "Transformers Don't Need LayerNorm at Inference Time", arXiv 2507.02559, without the removal. For a
norm with gain g and bias b, and a matrix W [inputs, outputs] with bias c that reads it:

    W' = C diag(g) W        c' = c + b W        gain 1, bias 0

where C = I - 11^T / d for a LayerNorm: what it puts out has mean zero, so the part of W that reads the mean may go
(`center=false` leaves it). An RMSNorm has no mean and no bias. Every norm divides by the same standard deviation as
before, and nothing is trained.

What keeps its gain: the last norm where the head is tied, since its matrix is the embedding too; norms on the queries
and keys of heads, and behind a sublayer, since no matrix reads them. Where a reader has no bias, the norm keeps b / g.

Exact means in real numbers: values are computed in fp64 and rounded once to the stored dtype. In fp32 the logits move
by about 1e-6 of their size, in bf16 by about a hundredth; both are printed, with the largest weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import UnsupportedError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class FoldConfig:
    """Hyperparameters of folding; `llmsurgery methods fold` prints them with their help."""

    center: bool = option(True, "let the readers of a LayerNorm ignore the mean of their inputs, which is zero")


@register
class Fold:
    """Folding as a method of the toolkit."""

    spec = MethodSpec(
        name="fold",
        task="remove-layernorm",
        summary="fold gains and biases of norms into the matrices that read them, exactly; the norms stay",
        paper="Transformers Don't Need LayerNorm at Inference Time (folding), arXiv 2507.02559",
        needs=(),
        export="plain",
        trained=False,
        demo="layernorm",
    )
    config_type = FoldConfig

    def plan(self, config: FoldConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the norms that matrices alone read, and these matrices.

        Raises:
            UnsupportedError: There is no such norm.
        """
        from llmsurgery.methods.norm_folding import folding_targets

        targets = folding_targets(structure)
        if not targets:
            raise UnsupportedError(
                "no gain of this model can be folded",
                "what reads its norms is no matrix, or shares its tensor with the embedding",
                "its gains stay where they are",
            )
        return targets

    def prepare(self, config: FoldConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No data are needed."""

    def edit(self, config: FoldConfig, operation: Operation, prepared: None) -> MethodResult:
        """Fold every norm that can be folded."""
        import numpy as np

        from llmsurgery.arch.norms import norms_of
        from llmsurgery.edits.kinds import Replace
        from llmsurgery.methods.norm_folding import folded_gains
        from llmsurgery.methods.norm_result import probe_ids, probe_logits, tell_of_difference

        structure, progress = operation.structure, operation.progress
        ids = probe_ids(operation)
        logits = probe_logits(operation.model, ids)
        folded = folded_gains(structure, operation.read, config.center)
        known = {tensor.stored: tensor for tensor in structure.tensors}
        largest = max(float(np.abs(values).max()) for values in folded.values.values())
        kept = [norm.name for norm in folded.kept]
        if kept:
            progress.notice(f"{len(kept)} norms keep their gain: {', '.join(kept[:4])}{', ...' if kept[4:] else ''}")

        def check(model: Any) -> None:
            tell_of_difference(operation, model, ids, logits, "the folded model", largest)

        edits = [Replace(name, values.astype(np.float32)) for name, values in folded.values.items()]
        record = {"folded": len(norms_of(structure)) - len(kept), "kept": kept, "largest_weight": largest}
        return MethodResult(edits, record, [known[edit.name] for edit in edits], check=check)
