"""How much of an assistant's logits to subtract, by scores from states recorded once; and how a student compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmsurgery.compute.head import chunk_rows
from llmsurgery.compute.modeling_uld import PairHead, combine
from llmsurgery.data.chat import Encoded
from llmsurgery.evaluate.likelihood import answer_probability

GRID = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
LARGEST_LOSS = 0.02
"""Share of the retain rows' probability that a strength, and then a student, may cost."""
STUDENT_GAP = 0.15
"""How far a student's forget.prob may lie above its teacher's before the user is told."""


@dataclass(frozen=True)
class Probabilities:
    """Means over rows of the geometric mean of the answer tokens' probabilities.

    Attributes:
        prob: As scores see them (`forget.prob`).
        generated: As generation sees them, where filtered tokens have no share; larger for every token that is kept.
    """

    prob: float
    generated: float

    @property
    def larger(self) -> float:
        """The larger of both: an answer is forgotten when neither scores nor generation know it."""
        return max(self.prob, self.generated)


@torch.inference_mode()
def score_strengths(
    head: PairHead, states: Sequence[torch.Tensor], rows: Sequence[Encoded], strengths: Sequence[float]
) -> dict[float, Probabilities]:
    """Return the mean probability of the answers at each strength.

    Args:
        head: Combines logits; its own strength plays no part.
        states: States of the labelled positions of each row [labels, 2 width].
        rows: The rows.
        strengths: What to try; 0 is the target alone.
    """
    sums = {strength: [0.0, 0.0] for strength in strengths}
    device = head.weight.device
    for own, row in zip(states, rows, strict=True):
        labels = torch.tensor(row.ids[len(row.ids) - len(own) :], device=device)
        scores: dict[float, list[torch.Tensor]] = {strength: [] for strength in strengths}
        parts = (torch.split(part, chunk_rows(head.weight)) for part in (own.to(device), labels))
        for chunk, wanted in zip(*parts, strict=True):
            both = head.logits_of_both(chunk)
            for strength in strengths:
                settings = {**head.settings, "strength": strength}
                logits = [combine(*both, settings, generating) for generating in (False, True)]
                found = torch.stack(logits).log_softmax(-1)
                scores[strength].append(found[:, torch.arange(len(wanted)), wanted])
        for strength in strengths:
            for mode, values in enumerate(torch.cat(scores[strength], 1).double().cpu().numpy()):
                sums[strength][mode] += answer_probability(values) / len(rows)
    return {strength: Probabilities(*sums[strength]) for strength in strengths}


@dataclass(frozen=True)
class Choice:
    """A chosen strength.

    Attributes:
        strength: The smallest that brings the forget rows below the target, else the one that comes nearest.
        stronger: The next larger one that keeps the retain rows, else the same.
        shortfall: What could not be had, for the user; empty if nothing.
    """

    strength: float
    stronger: float
    shortfall: str = ""


def choose_strength(
    forget: Mapping[float, Probabilities], retain: Mapping[float, Probabilities], target: float
) -> Choice:  # fmt: skip
    """Choose among the strengths that were scored; 0 must be among those of the retain rows.

    Args:
        forget: Strength -> scores of the forget rows.
        retain: Strength -> scores of the retain rows; empty without any.
        target: The forget rows' probability is to fall below it, for scores and generation alike.
    """
    tried = sorted(strength for strength in forget if strength > 0)
    least = (1 - LARGEST_LOSS) * retain[0.0].prob if retain else 0.0
    allowed = [strength for strength in tried if not retain or retain[strength].prob >= least]
    if not allowed:
        text = f"every strength costs the retain rows more than {LARGEST_LOSS:.0%} of their probability"
        return Choice(tried[0], tried[0], text)
    reached = [strength for strength in allowed if forget[strength].larger < target]
    chosen = reached[0] if reached else min(allowed, key=lambda strength: forget[strength].larger)
    stronger = next((strength for strength in allowed if strength > chosen), chosen)
    text = "" if reached else f"no strength brings forget.prob below {target:g}"
    return Choice(chosen, stronger, text)


def student_shortfall(teacher: Mapping[str, float], student: Mapping[str, float]) -> list[str]:
    """Return what a student has not taken over from its teacher, for the user; empty if it has.

    Args:
        teacher: "forget.prob" and "retain.prob" of the combination.
        student: The same of the student.
    """
    found = []
    if student["forget.prob"] > teacher["forget.prob"] + STUDENT_GAP:
        found.append(
            f"the student has forget.prob {student['forget.prob']:.3f}, its teacher {teacher['forget.prob']:.3f}: "
            "more steps or a larger step size bring it nearer"
        )
    if student["retain.prob"] < (1 - LARGEST_LOSS) * teacher["retain.prob"]:
        found.append(
            f"the student has retain.prob {student['retain.prob']:.3f}, its teacher {teacher['retain.prob']:.3f}: "
            "more retain rows or steps bring it nearer"
        )
    return found
