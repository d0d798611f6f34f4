"""Unlearning metrics as functions of per-row numbers: no model, no torch, the same for live models and for logs.

N is the sum of -log p over the labelled tokens of an answer, n their number, l = N / n the mean token loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = Sequence[float] | npt.NDArray[np.float64]

MEANS = ("geometric", "arithmetic")
FLOOR = 1e-10
"""Added to the correct probability of a truth ratio and to the sum of a normalised probability."""


def log_mean_probability(losses: Numbers, mean: str) -> float:
    """Return log w of several wrong answers with mean token losses l_j.

    Args:
        losses: l_j, at least one.
        mean: "geometric": w = exp(-mean l_j); "arithmetic": w = mean exp(-l_j).
    """
    values = -np.asarray(losses, dtype=np.float64)
    if mean == "geometric":
        return float(values.mean())
    return float(np.logaddexp.reduce(values) - math.log(len(values)))


def log_truth_ratio(correct_loss: float, wrong_losses: Numbers, mean: str) -> float:
    """Return log R of one row, R = w / (c + 1e-10) and c = exp(-correct_loss) (M4).

    The logarithm keeps rows whose correct probability vanishes: R itself, or 1 / R, could overflow.
    """
    return log_mean_probability(wrong_losses, mean) - float(np.logaddexp(-correct_loss, math.log(FLOOR)))


def indistinguishability(log_ratio: float) -> float:
    """Return min(R, 1/R): 1 where right and wrong answers are equally likely (forget rows)."""
    return math.exp(-abs(log_ratio))


def preference(log_ratio: float) -> float:
    """Return max(0, 1 - R): 1 where the right answer is far more likely (rows that are to stay)."""
    return -math.expm1(log_ratio) if log_ratio < 0 else 0.0


def normalised_probability(loss: float, wrong_losses: Numbers) -> float:
    """Return P(a) / (P(a) + sum_j P(w_j) + 1e-10) of one row (M2)."""
    answer = math.exp(-loss)
    return answer / (answer + float(np.exp(-np.asarray(wrong_losses, dtype=np.float64)).sum()) + FLOOR)


def harmonic_mean(values: Numbers) -> float:
    """Return the harmonic mean; 0 if any value is 0 (M5)."""
    numbers = np.asarray(values, dtype=np.float64)
    return 0.0 if bool((numbers <= 0).any()) else float(len(numbers) / (1 / numbers).sum())


def token_accuracy(greedy: npt.NDArray[np.bool_]) -> float:
    """Return the share of tokens that are the model's first choice (M8); end token left out by the caller."""
    return float(greedy.mean())


def extraction_strength(greedy: npt.NDArray[np.bool_], released: bool = False) -> float:
    """Return 1 - k/n', k the length of the shortest prefix after which every prediction is right (M9).

    Args:
        greedy: Whether each answer token is the model's first choice; end token left out by the caller.
        released: Score a complete miss as 1/n', as open-unlearning's loop does.
    """
    misses = np.flatnonzero(~greedy)
    prefix = 0 if len(misses) == 0 else int(misses[-1]) + 1
    if released:
        prefix = min(prefix, len(greedy) - 1)
    return 1 - prefix / len(greedy)


def _lowest(values: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.float64]:
    # The small term undoes products such as 0.29 * 100 = 28.999...
    count = max(1, math.floor(share * len(values) + 1e-9))
    return np.partition(values, count - 1)[:count]


def min_k(log_probabilities: Numbers, share: float) -> float:
    """Return minus the mean of the lowest token log-probabilities (Min-K%, M10)."""
    return -float(_lowest(np.asarray(log_probabilities, dtype=np.float64), share).mean())


def min_k_plus_plus(log_probabilities: Numbers, mean: Numbers, variance: Numbers, share: float) -> float:
    """Return minus the mean of the lowest standardised log-probabilities (Min-K%++, M10)."""
    spread = np.sqrt(np.maximum(np.asarray(variance, dtype=np.float64), 1e-6))
    scores = (np.asarray(log_probabilities, dtype=np.float64) - np.asarray(mean, dtype=np.float64)) / spread
    return -float(_lowest(scores, share).mean())


def membership_auc(forget: Numbers, holdout: Numbers) -> float:
    """Return P(score of holdout > score of forget) + ties / 2: 1 where the forget set was obviously seen."""
    seen = np.sort(np.asarray(forget, dtype=np.float64))
    unseen = np.asarray(holdout, dtype=np.float64)
    below, up_to = np.searchsorted(seen, unseen, "left"), np.searchsorted(seen, unseen, "right")
    return float((below + up_to).sum() / (2 * len(seen) * len(unseen)))


def privacy_leakage(auc: float, reference_auc: float = 0.5) -> float:
    """Return MUSE's PrivLeak from AUCs of this product's direction (M7).

    MUSE's A is 1 - AUC: memorised models score near -100, over-unlearned ones above 0.
    """
    reference = 1 - reference_auc
    return math.nan if reference == 0 else 100 * ((1 - auc) - reference) / reference
