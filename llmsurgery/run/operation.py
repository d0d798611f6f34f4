"""What a method is given by a run, and what is known once it has run and nothing is written yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation
from llmsurgery.run.forms import BESIDE, Changes
from llmsurgery.run.manifest import earlier_operations
from llmsurgery.run.notices import Notices
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.recover import other_models
from llmsurgery.run.training import make_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.compute.stream import StreamedModel
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.evaluate.recovery import Recovery
    from llmsurgery.train.session import Session
    from llmsurgery.train.trainable import ReadTensor


@dataclass(frozen=True)
class Operated:
    """What a method made of the source.

    Attributes:
        before: Figures of the source.
        changes: Edits and files.
        record: The method's record.
        targets: The tensors that it aimed at.
        check: Checks the loaded result; None if the method has no check of its own.
    """

    before: Measurement
    changes: Changes
    record: dict[str, object]
    targets: Sequence[RoleTensor]
    check: Callable[[PreTrainedModel], None] | None = None


def make_operation(
    prepared: Prepared,
    notices: Notices,
    read: ReadTensor,
    model: PreTrainedModel,
    streamed: StreamedModel | None,
    session: Session,
    recovery: Recovery | None = None,
) -> Operation:
    """Return what a method receives besides its config; for all but `prepared` see `Operation`."""
    root = prepared.checkpoint.root
    return Operation(
        structure=prepared.structure,
        source_config=prepared.checkpoint.config,
        read=read,
        model=model,
        encoder=prepared.encoder,
        data=prepared.rows,
        seed=prepared.request.seed,
        progress=notices,
        training=session,
        statistics=make_statistics(prepared),
        pairs=prepared.pairs,
        choices=prepared.given.choices,
        contrast=prepared.given.contrast,
        streamed=streamed,
        beside=root / BESIDE,
        history=earlier_operations(root),
        models=other_models(prepared),
        recovery=recovery,
        pictured=prepared.pictured_given,
        adapter=prepared.adapter,
    )
