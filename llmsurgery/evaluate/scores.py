"""Numbers per row: what a model's pass over a data set, or a published log, leaves for the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import islice

from llmsurgery.evaluate.formulas import log_truth_ratio

PerRow = Mapping[str, float]
"""Row index (as text, the key of a log) -> number; rows without the number are left out."""


@dataclass(frozen=True)
class SetScores:
    """Per-row numbers of one data set; empty where they were not measured.

    Attributes:
        token_prob: Arithmetic mean of the answer tokens' probabilities, end token left out.
        loss: Mean token loss of the answer, end token counted.
        rouge: ROUGE-L of the greedy answer, recall or F1 as the protocol says.
        accuracy: Share of greedy hits among the answer tokens.
        strength: Extraction strength.
        correct_loss: Mean token loss of the paraphrased answer, of the answer itself where a row has no paraphrase.
        wrong_losses: Mean token losses of the wrong answers.
        log_ratio: Log of the geometric truth ratio, where a log holds it without the losses behind it.
        normalised: Normalised probability of the answer, where a log holds it without the losses behind it.
        membership: Share k -> Min-K% score.
    """

    token_prob: PerRow = field(default_factory=dict)
    loss: PerRow = field(default_factory=dict)
    rouge: PerRow = field(default_factory=dict)
    accuracy: PerRow = field(default_factory=dict)
    strength: PerRow = field(default_factory=dict)
    correct_loss: PerRow = field(default_factory=dict)
    wrong_losses: Mapping[str, list[float]] = field(default_factory=dict)
    log_ratio: PerRow = field(default_factory=dict)
    normalised: PerRow = field(default_factory=dict)
    membership: Mapping[float, PerRow] = field(default_factory=dict)

    def first(self, rows: int) -> SetScores:
        """Return the numbers of the first rows, in the order of the log; all of them for 0."""
        if not rows:
            return self
        kept = {
            item.name: dict(islice(column.items(), rows))
            for item in fields(self)
            if item.name != "membership" and (column := getattr(self, item.name))
        }
        return replace(self, **kept)

    @property
    def has_losses(self) -> bool:
        """Whether truth ratios of either mean can be computed."""
        return bool(self.correct_loss and self.wrong_losses)

    @property
    def has_ratios(self) -> bool:
        """Whether the truth ratios of the geometric mean are known."""
        return self.has_losses or bool(self.log_ratio)

    def log_ratios(self, mean: str) -> dict[str, float]:
        """Return the log truth ratio of every row that has one.

        Args:
            mean: "geometric" or "arithmetic"; a log without losses holds the geometric ones alone.
        """
        if not self.has_losses:
            return dict(self.log_ratio) if mean == "geometric" else {}
        return {
            index: log_truth_ratio(self.correct_loss[index], wrong, mean)
            for index, wrong in self.wrong_losses.items()
            if index in self.correct_loss
        }


def by_row(values: Iterable[float]) -> dict[str, float]:
    """Number values by their row."""
    return {str(index): value for index, value in enumerate(values)}
