"""Losses over forget rows as sums of terms: one on the forget rows, one on retain rows drawn along with them.

The training loop averages over the rows of a step, whatever their division into micro-batches. A mean over tokens is
made to fit that: each part is divided by the number of tokens of the whole step, which `begin` counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llmsurgery.compute.divergence import divergence
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded
from llmsurgery.train.config import TrainingConfig
from llmsurgery.train.loop import planned_steps
from llmsurgery.train.reference import Reference
from llmsurgery.train.scorer import Scorer
from llmsurgery.train.session import Session

Value = Callable[[Sequence[int]], torch.Tensor]
"""Takes numbers of forget rows of the current step, returns their mean loss []."""


def _nothing(_rows: Sequence[int]) -> None:
    """Begin a step of a term that needs no preparation."""


@dataclass(frozen=True)
class Term:
    """One summand of a loss.

    Attributes:
        value: Mean over some forget rows of the current step; may be asked for several times in a step.
        weight: Its factor.
        begin: Told of all rows of a step before `value` is asked for.
    """

    value: Value
    weight: float = 1.0
    begin: Callable[[Sequence[int]], None] = _nothing


@dataclass(frozen=True)
class RowLoss:
    """A loss over forget rows, for `llmsurgery.train.loop.train` and for methods that wrap it.

    Attributes:
        rows: Number of forget rows.
        session: Told of the value of each term.
        forget: The term on the forget rows.
        retain: The term on retain rows; None without one.
        facts: What the manifest should say of it.
    """

    rows: int
    session: Session
    forget: Term
    retain: Term | None = None
    facts: Mapping[str, object] = field(default_factory=dict)

    def begin(self, rows: Sequence[int]) -> None:
        """Prepare a step: draw and count what belongs to these forget rows."""
        self.forget.begin(rows)
        if self.retain is not None:
            self.retain.begin(rows)

    def __call__(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the mean loss of some forget rows of the current step []."""
        forget = self.forget.value(rows)
        total = self.forget.weight * forget
        if self.retain is None or self.retain.weight == 0:
            return total
        retain = self.retain.value(rows)
        self.session.observe(forget_loss=float(forget.detach()), retain_loss=float(retain.detach()))
        return total + self.retain.weight * retain


class TokenMean:
    """Turns sums over the tokens of some rows of a step into their share of the mean over the step's tokens."""

    def __init__(self) -> None:
        self.per_row = math.nan

    def begin(self, counts: Sequence[int]) -> None:
        """Take the number of tokens of each row of a step."""
        self.per_row = sum(counts) / len(counts)

    def __call__(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the sum of the values of some rows over (number of these rows * tokens per row of the step) []."""
        return values.sum() / (rows * self.per_row)


def label_counts(rows: Sequence[Encoded]) -> list[int]:
    """Return how many tokens of each row are labelled; nothing predicts the first token of a sequence."""
    return [len(row.ids) - max(1, row.answer_start) for row in rows]


def ascent(
    scorer: Scorer, rows: Sequence[Encoded], session: Session, bound: float | None, weight: float = 1.0
) -> Term:  # fmt: skip
    """Return minus the cross-entropy of the forget answers, a mean over tokens, bounded below.

    Args:
        scorer: The model.
        rows: The forget rows.
        session: Told of the cross-entropy without the bound (`forget_ce`).
        bound: Nats above which a token's surprisal counts as the bound and is pushed no further; None for log V, 0 for
            no bound.
        weight: Factor of the term.
    """
    limit = chance(scorer) if bound is None else bound or math.inf
    counts = label_counts(rows)
    mean = TokenMean()

    def value(indices: Sequence[int]) -> torch.Tensor:
        scores, _ = scorer.log_probabilities([rows[i] for i in indices])
        session.observe(forget_ce=-float(scores.detach().mean()))
        return mean(scores.clamp(min=-limit), len(indices))

    return Term(value, weight, lambda indices: mean.begin([counts[i] for i in indices]))


def cross_entropy(scorer: Scorer, rows: Sequence[Encoded]) -> Term:
    """Return the cross-entropy of the answers, a mean over tokens; of plain text every token but the first is one.

    Args:
        scorer: The model.
        rows: The rows that are trained on.
    """
    counts = label_counts(rows)
    mean = TokenMean()

    def value(indices: Sequence[int]) -> torch.Tensor:
        return mean(-scorer.log_probabilities([rows[i] for i in indices])[0], len(indices))

    return Term(value, begin=lambda indices: mean.begin([counts[i] for i in indices]))


def chance(scorer: Scorer) -> float:
    """Return log V, the cross-entropy of guessing among all tokens."""
    return math.log(scorer.head.weight.shape[0])


class Partners:
    """One retain row for each forget row of a step, drawn at random and kept for the step.

    There are at most as many different retain rows as there are draws in the whole run, so that what is computed for
    each of them in advance costs no more than training itself.

    Args:
        rows: Number of retain rows.
        forget: Number of forget rows.
        training: Says how many steps there are.
        session: Its generator draws; its state is kept with the training state.
    """

    def __init__(self, rows: int, forget: int, training: TrainingConfig, session: Session) -> None:
        self.random = session.random
        draws = max(1, planned_steps(training, forget) * min(training.batch_size, forget))
        self.pool = list(range(rows)) if rows <= draws else self.random.sample(range(rows), draws)
        self.drawn: dict[int, int] = {}

    def begin(self, rows: Sequence[int]) -> None:
        """Draw a partner for each forget row."""
        self.drawn = {row: self.random.choice(self.pool) for row in rows}

    def of(self, rows: Sequence[int]) -> list[int]:
        """Return the partners of some forget rows of the step."""
        return [self.drawn[row] for row in rows]


def retain_term(partners: Partners, values: Value, counts: Sequence[int], weight: float) -> Term:
    """Return a term on retain rows, a mean over their tokens.

    Args:
        partners: Draws the retain rows.
        values: Takes numbers of retain rows, returns one value per token, or their sums.
        counts: Number of tokens of each retain row.
        weight: Factor of the term.
    """
    mean = TokenMean()

    def begin(indices: Sequence[int]) -> None:
        partners.begin(indices)
        mean.begin([counts[i] for i in partners.of(indices)])

    def value(indices: Sequence[int]) -> torch.Tensor:
        return mean(values(partners.of(indices)), len(indices))

    return Term(value, weight, begin)


def retain_cross_entropy(scorer: Scorer, rows: Sequence[Encoded], partners: Partners, weight: float) -> Term:
    """Return the cross-entropy of the retain answers, a mean over tokens."""
    return retain_term(
        partners, lambda indices: scorer.surprisals([rows[i] for i in indices]), label_counts(rows), weight
    )


def retain_divergence(
    scorer: Scorer, rows: Sequence[Encoded], partners: Partners, weight: float, progress: Progress
) -> Term:
    """Return KL(before training || now) at the labelled positions of the retain rows, a mean over them."""

    def states(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = scorer.labelled([rows[i] for i in indices])
        return parts.hidden, parts.owners

    reference = Reference(scorer, states, partners.pool, progress)

    def values(indices: Sequence[int]) -> torch.Tensor:
        kept = reference(indices)
        return divergence(states(indices)[0], scorer.head, kept, reference.head)

    return retain_term(partners, values, label_counts(rows), weight)
