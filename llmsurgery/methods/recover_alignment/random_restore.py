"""random-restore: put as many entries of the aligned model back as `restore` would, but drawn at random.

A control, after the method of arXiv 2504.09757: whoever reports that a choice of entries brings refusals back has to
show that as many others do not. choose=largest takes the entries with the largest |b - a| instead, the second control.
With a the aligned and b the fine-tuned model, over weights and biases of the first floor(2n/3) blocks, norms left out:

    entries with b != a, drawn at random: b <- a
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.recovering import (
    block_parameters,
    controls,
    other_values,
    own_values,
    random_masks,
    removed_share,
    restored_edits,
    searched_targets,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class RandomRestoreConfig:
    """Hyperparameters of random-restore; `llmsurgery methods random-restore` prints them with their help."""

    entries: int | None = option(None, "entries that are restored; none: `share`", minimum=1)
    share: float = option(0.04, "entries, as a share of the parameters of all blocks", minimum=0, maximum=1)
    choose: str = option("random", "random, or those that differ most", ("random", "largest"))
    blocks: int | None = option(None, "blocks that are drawn from; none: floor(2n/3)", minimum=1)
    controls: bool = option(True, "measure another random restoration and an interpolation of the same size")


@register
class RandomRestore:
    """random-restore as a method of the toolkit."""

    spec = MethodSpec(
        name="random-restore",
        task="recover-alignment",
        summary="the control of restore: entries of the aligned model at random, or where the models differ most",
        paper="control of Alleviating the Fear of Losing Alignment in LLM Fine-tuning, arXiv 2504.09757",
        needs=(),
        uses=("harmful", "task"),
        export="plain",
        trained=False,
        selects=True,
        models=("aligned",),
        demo="refuse",
    )
    config_type = RandomRestoreConfig

    def plan(self, config: RandomRestoreConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that entries are drawn from."""
        return searched_targets(structure, config.blocks)

    def prepare(self, config: RandomRestoreConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No data is needed."""

    def edit(self, config: RandomRestoreConfig, operation: Operation, prepared: None) -> MethodResult:
        """Draw the entries and return them."""
        targets = searched_targets(operation.structure, config.blocks)
        count = config.entries or math.ceil(config.share * block_parameters(operation.structure))
        masks = random_masks(operation, targets, count, operation.seed, config.choose == "largest")
        edits, changed, counts = restored_edits(operation, targets, masks)
        chosen = {target.stored: mask for target, mask in zip(targets, masks, strict=True)}

        def result(target: RoleTensor) -> torch.Tensor:
            own = own_values(operation, target)
            return own.where(~chosen[target.stored].view(own.shape), other_values(operation, "aligned", target))

        removed, entries = removed_share(operation, result, changed)
        record: dict[str, object] = {"restored": counts, "wanted": count}
        record["controls"] = controls(operation, targets, removed, entries, config.controls)
        return MethodResult(edits, record, changed)
