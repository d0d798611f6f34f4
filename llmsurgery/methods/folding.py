"""The result of a width that was gated in training: smaller tensors, what is to be known of them, and a check."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmsurgery.methods.base import MethodResult, Operation
from llmsurgery.methods.narrowing import is_tied, narrowed_parameters, narrowed_tensors
from llmsurgery.methods.widths import Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.data.chat import Encoded
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.train.loop import TrainingResult
    from llmsurgery.train.width_gate import WidthGate

RECORD = "width.json"
"""File beside the result with the channels that were kept, the operators and the gates."""

JUMP = 0.05
"""Nats per token by which folding or rounding may change the loss without a notice."""


def folded(
    untie: bool,
    operation: Operation,
    widths: Widths,
    gate: WidthGate,
    trained: Sequence[Edit],
    result: TrainingResult,
    losses: Mapping[str, float],
    rows: Sequence[Encoded],
) -> MethodResult:
    """Return the result of a trained gate.

    Args:
        untie: Whether a tied model gets a head of its own.
        operation: What the method was given.
        widths: The widths.
        gate: The gate and its operators.
        trained: What training made of the weights, in the source's shapes.
        result: What training did.
        losses: `loss_last`, `loss_rounded` and more.
        rows: What was trained on.
    """
    from llmsurgery.edits.kinds import LowRank, Replace
    from llmsurgery.methods.narrowing import Narrowing, narrowed_edits, stored_channels

    indices, alive = stored_channels(gate.kept().cpu().numpy(), widths.stored)
    operators = {place: gate.operator(place) for place in gate.places if len(gate.operator(place).inner)}
    untied = untie and is_tied(operation.structure)
    narrowing = Narrowing(widths, indices, alive, operators, untied)
    changes = {edit.name: edit for edit in trained if isinstance(edit, LowRank | Replace)}
    gone = narrowed_parameters(narrowed_tensors(operation.structure), widths)
    total = sum(tensor.parameters for tensor in operation.structure.tensors)
    record = {
        **result.record(),
        "width": widths.before,
        "kept_width": widths.keep,
        "stored_width": widths.stored,
        "open_gates": int((gate.proxy > 0).sum()) if gate.fixed is None else widths.keep,
        "undecided_gates": gate.undecided(),
        "removed_parameters": gone,
        "removed_share_of_all": gone / total,
        **losses,
    }
    if losses["loss_rounded"] > losses["loss_last"] + JUMP:
        operation.progress.notice(
            f"rounding the gates raised the loss from {losses['loss_last']:.3f} to {losses['loss_rounded']:.3f}: "
            "a larger --set rounded=... lets the weights adapt to it"
        )
    beside = {RECORD: (json.dumps(described(gate, indices, alive), indent=2) + "\n").encode()}
    edits = narrowed_edits(operation, narrowing, changes)
    check = folding_check(operation, rows, losses["loss_rounded"])
    return MethodResult(edits, record, beside=beside, check=check)


def described(gate: WidthGate, indices: Any, alive: Any) -> dict[str, object]:
    """Return what a later look at the result may want: channels, proxies, and how far operators are from none."""
    import torch

    names = {("embed" if layer is None else f"{kind}.{layer}"): (kind, layer) for kind, layer in gate.places}
    operators = {name: gate.operator(place) for name, place in names.items()}
    with torch.no_grad():
        histogram = torch.histc(gate.proxy.float().cpu(), 20, -1, 1).int().tolist()
        distances = {name: float((o.outer @ o.inner).norm()) for name, o in operators.items() if len(o.inner)}
        scales = {name: [float(o.scale.min()), float(o.scale.max())] for name, o in operators.items()}
    return {
        "channels": [int(index) for index, living in zip(indices, alive, strict=True) if living],
        "stored_channels": [int(index) for index in indices],
        "proxies_from_minus_1_to_1": histogram,
        "operator_norms": distances,
        "scales": scales,
    }


def folding_check(
    operation: Operation, rows: Sequence[Encoded], expected: float
) -> Callable[[PreTrainedModel], None]:  # fmt: skip
    """Return what compares the stored result's loss with that of the gated model, and tells where they differ."""

    def check(model: PreTrainedModel) -> None:
        from llmsurgery.train.scorer import Scorer
        from llmsurgery.train.trainable import Trainable
        from llmsurgery.train.width_loss import MEASURED_ROWS, plain_loss

        scorer = Scorer(Trainable(model, [], None, list, None), operation.encoder.pad_id)
        found = plain_loss(scorer, rows[:MEASURED_ROWS], operation.training.micro_batch or 4)
        if abs(found - expected) > JUMP:
            operation.progress.notice(
                f"the stored result has a loss of {found:.3f} on the first rows of --calibration, the model in "
                f"training had {expected:.3f}: rounding to the stored dtype changed it"
            )

    return check
