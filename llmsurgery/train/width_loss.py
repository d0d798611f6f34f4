"""What a model with a gate on its width is trained by: its own text or the source's distributions, and its gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmsurgery.compute.divergence import divergence
from llmsurgery.compute.head import label_log_probabilities
from llmsurgery.data.chat import Encoded
from llmsurgery.train.losses import TokenMean, label_counts
from llmsurgery.train.reference import Reference
from llmsurgery.train.scorer import Scorer
from llmsurgery.train.session import Session
from llmsurgery.train.width_gate import Manner, WidthGate

MEASURED_ROWS = 16
"""Rows that the loss is measured on before and after rounding, at most."""

_STEP = "gate_step"
"""Name of the step among the observed figures, which are kept in the state of a run."""


@dataclass
class WidthLoss:
    """Loss over rows, the count of open gates, and the identity loss of the operators.

    Attributes:
        scorer: The model, gate and operators attached.
        rows: What is trained on.
        gate: The gate.
        rounded_from: Step from which the gate is rounded.
        session: Told of the parts; it keeps the step.
        identity_weight: Weight of the identity loss.
        teacher: The source's states, to be distilled in place of the text; None for the text itself.
    """

    scorer: Scorer
    rows: Sequence[Encoded]
    gate: WidthGate
    rounded_from: int
    session: Session
    identity_weight: float
    teacher: Reference | None = None
    mean: TokenMean = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        """Count the labels of each row."""
        self.counts = label_counts(self.rows)

    def begin(self, indices: Sequence[int]) -> None:
        """Set the gate to the step that begins."""
        step = int(self.session.observed.get(_STEP, -1)) + 1
        self.session.observe(**{_STEP: step})
        self.settle()
        self.mean.begin([self.counts[i] for i in indices])

    def settle(self) -> None:
        """Set the gate to the last step that began; a run that goes on from a finished training begins none."""
        step = int(self.session.observed.get(_STEP, 0))
        self.gate.step = step
        self.gate.manner = Manner.ROUNDED if step >= self.rounded_from else Manner.SOFT

    def __call__(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the mean over some rows of the step, and what the gate adds []."""
        parts = self.scorer.labelled([self.rows[i] for i in indices])
        if self.teacher is None:
            values = -label_log_probabilities(parts.hidden, self.scorer.head, parts.labels)
        else:
            values = divergence(parts.hidden, self.scorer.head, self.teacher(indices), self.teacher.head)
        written = self.mean(values, len(indices))
        count, identity = self.gate.losses()
        self.session.observe(
            row_loss=float(written.detach()), count_loss=float(count.detach()), identity_loss=float(identity.detach())
        )
        return written + count + self.identity_weight * identity


def source_states(scorer: Scorer, rows: Sequence[Encoded], gate: WidthGate, session: Session) -> Reference:
    """Return what gives the states of the source; without adapters to switch off they are recorded here."""

    def states(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with gate.standing(Manner.AWAY):
            parts = scorer.labelled([rows[i] for i in indices])
        return parts.hidden, parts.owners

    return Reference(scorer, states, range(len(rows)), session.progress)


def measured_loss(scorer: Scorer, rows: Sequence[Encoded], gate: WidthGate, manner: Manner, size: int) -> float:
    """Return the cross-entropy per token of the first rows as the gate stands, in nats.

    Args:
        scorer: The model, gate and operators attached.
        rows: The rows.
        gate: The gate.
        manner: How it is to stand.
        size: Rows per forward.
    """
    model = scorer.trainable.model
    training = model.training
    model.eval()
    with gate.standing(manner):
        loss = plain_loss(scorer, rows[:MEASURED_ROWS], size)
    model.train(training)
    return loss


@torch.no_grad()
def plain_loss(scorer: Scorer, rows: Sequence[Encoded], size: int) -> float:
    """Return the cross-entropy per labelled token of some rows, in nats.

    Args:
        scorer: The model.
        rows: The rows.
        size: Rows per forward.
    """
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return -float(torch.cat([scorer.log_probabilities(part)[0] for part in parts]).mean())
