"""Per-row numbers to figures: the same for live models and for logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.formulas import (
    harmonic_mean,
    indistinguishability,
    membership_auc,
    normalised_probability,
    preference,
    privacy_leakage,
)
from llmsurgery.evaluate.intervals import Draw, Figure, mean_figure, resampled_interval
from llmsurgery.evaluate.kolmogorov import two_sample_test
from llmsurgery.evaluate.scores import PerRow, SetScores

UTILITY_SETS = ("retain", "authors", "facts")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Shares of Min-K% that are reported beside the chosen one."""


def aggregate(
    scores: Mapping[str, SetScores], config: EvaluationConfig, reference: Mapping[str, SetScores] | None = None
) -> dict[str, Figure]:
    """Return every figure that the numbers allow.

    Args:
        scores: Set name ("forget", "retain", "holdout", "authors", "facts") -> numbers per row.
        config: Settled evaluation settings.
        reference: Numbers of a model that never saw the forget rows, on the same "forget" and "holdout" rows.
    """
    figures: dict[str, Figure] = {}
    for name in ("forget", "retain"):
        if name in scores:
            figures.update(set_figures(name, scores[name], config))
    if (found := _membership(scores, config, reference or {})) is not None:
        figures["forget.min_k_auc"] = found
    if reference is not None and (quality := forget_quality(scores, reference)) is not None:
        figures["forget.quality"] = quality
    if (utility := model_utility(scores, config)) is not None:
        figures["utility.model_utility"] = utility
    return figures


def set_figures(name: str, scores: SetScores, config: EvaluationConfig) -> dict[str, Figure]:
    """Return the means of one set, named `NAME.METRIC`."""
    columns: dict[str, PerRow] = {
        "token_prob": scores.token_prob,
        "prob": {index: math.exp(-loss) for index, loss in scores.loss.items()},
        "rouge_l": scores.rouge,
        "accuracy": scores.accuracy,
        "extraction_strength": scores.strength,
    }
    figures = {f"{name}.{key}": mean_figure(list(rows.values())) for key, rows in columns.items() if rows}
    ratios = scores.log_ratios(_mean_of(config))
    if ratios:
        kind = indistinguishability if name == "forget" else preference
        detail: dict[str, object] = {"mean": _mean_of(config)}
        # open-unlearning's other aggregate: the mean of c / (c + w).
        detail["prob_mean"] = float(np.mean([_correct_share(ratio) for ratio in ratios.values()]))
        figures[f"{name}.truth_ratio"] = mean_figure([kind(ratio) for ratio in ratios.values()], detail)
    return figures


def _mean_of(config: EvaluationConfig) -> str:
    return config.truth_ratio_mean or "geometric"


def _correct_share(log_ratio: float) -> float:
    """1 / (1 + R) without overflow."""
    return 0.5 - 0.5 * math.tanh(log_ratio / 2)


def _membership(
    scores: Mapping[str, SetScores], config: EvaluationConfig, reference: Mapping[str, SetScores]
) -> Figure | None:
    curves = _membership_columns(scores)
    if config.min_k not in curves:
        return None
    forget, holdout = curves[config.min_k]
    value = membership_auc(forget, holdout)
    interval = None
    if min(len(forget), len(holdout)) > 1:
        interval = resampled_interval(
            lambda draw: membership_auc(forget[draw(len(forget))], holdout[draw(len(holdout))])
        )
    theirs = _membership_columns(reference).get(config.min_k)
    against = 0.5 if theirs is None else membership_auc(*theirs)
    detail: dict[str, object] = {
        "min_k": config.min_k,
        "holdout_rows": len(holdout),
        "auc_by_k": {f"{share:g}": membership_auc(*pair) for share, pair in curves.items()},
        "reference_auc": against,
        "privacy_leakage": privacy_leakage(value, against),
    }
    return Figure(value, len(forget), interval, detail)


def _membership_columns(
    scores: Mapping[str, SetScores],
) -> dict[float, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    seen, unseen = (scores.get(name, SetScores()).membership for name in ("forget", "holdout"))
    return {
        share: (_column(seen[share]), _column(unseen[share])) for share in seen if seen[share] and unseen.get(share)
    }


def _column(rows: PerRow) -> npt.NDArray[np.float64]:
    return np.fromiter(rows.values(), dtype=np.float64)


def forget_quality(scores: Mapping[str, SetScores], reference: Mapping[str, SetScores]) -> Figure | None:
    """Return the KS p-value between the truth ratios of two models on the forget rows (M6), or None without ratios.

    Truth ratios are geometric here under every protocol, as in both published tools.
    """
    samples = [side.get("forget", SetScores()).log_ratios("geometric") for side in (scores, reference)]
    ours, theirs = ([ratio for ratio in sample.values() if not math.isnan(ratio)] for sample in samples)
    if not ours or not theirs:
        return None
    test = two_sample_test(ours, theirs)
    detail = {"log10_p": test.log10_p, "statistic": test.statistic, "reference_rows": len(theirs)}
    return Figure(test.p, len(ours), None, detail)


def model_utility(scores: Mapping[str, SetScores], config: EvaluationConfig) -> Figure | None:
    """Return the harmonic mean of probability, ROUGE-L and truth ratio on three sets (M5), None if one is missing."""
    parts: dict[str, list[npt.NDArray[np.float64]]] = {}
    for name in UTILITY_SETS:
        columns = _utility_columns(name, scores[name], config) if name in scores else []
        if not columns or not all(columns):
            return None
        # Rows side by side, so that a resample takes all three numbers of a row; NaN where a row has none.
        rows = sorted(set().union(*columns))
        parts[name] = [np.array([column.get(index, math.nan) for index in rows]) for column in columns]

    def utility(draw: Draw) -> float:
        means: list[float] = []
        for columns in parts.values():
            chosen = draw(len(columns[0]))
            # A resample may hold no answered row at all.
            means += [_known_mean(column[chosen]) for column in columns]
        return math.nan if np.isnan(means).any() else harmonic_mean(means)

    figures = {
        f"{name}.{metric}": _known_mean(column)
        for name, columns in parts.items()
        for metric, column in zip(("prob", "rouge_l", "truth_ratio"), columns, strict=True)
    }
    value = harmonic_mean(list(figures.values()))
    detail: dict[str, object] = {"protocol": config.protocol, "truth_ratio_mean": _mean_of(config), **figures}
    return Figure(value, sum(len(columns[0]) for columns in parts.values()), resampled_interval(utility), detail)


def _known_mean(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _utility_columns(name: str, scores: SetScores, config: EvaluationConfig) -> Sequence[PerRow]:
    ratios = scores.log_ratios(_mean_of(config))
    if name == "retain":
        probability = {index: math.exp(-loss) for index, loss in scores.loss.items()}
    elif not scores.wrong_losses:
        probability = dict(scores.normalised)
    else:
        probability = {
            index: normalised_probability(loss, scores.wrong_losses[index])
            for index, loss in scores.loss.items()
            if index in scores.wrong_losses
        }
    return probability, scores.rouge, {index: preference(ratio) for index, ratio in ratios.items()}
