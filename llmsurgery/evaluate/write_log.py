"""Writing evaluation logs that open-unlearning and TOFU's script take as logs of a retain model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from llmsurgery.evaluate.intervals import Figure
from llmsurgery.evaluate.logs import FILES, PREFIXES
from llmsurgery.evaluate.scores import SetScores


def build_log(
    scores: Mapping[str, SetScores],
    figures: Mapping[str, Figure],
    min_k: float,
    rouge_key: str,
    origin: Mapping[str, object],
) -> dict[str, object]:
    """Return a log in open-unlearning's layout: numbers by row index, never text.

    Beside it stands TOFU's part for the forget rows, all that its script reads of a retain model.

    Args:
        scores: Set name -> numbers per row.
        figures: The figures made of them.
        min_k: Share that `mia_min_k` is written for.
        rouge_key: "rougeL_recall" or "rougeL_f1".
        origin: Versions and settings, for people.
    """
    document: dict[str, object] = {"llmsurgery": dict(origin)}
    for name, prefix in PREFIXES.items():
        if name in scores:
            document.update(_set_log(scores[name], name, prefix, figures, rouge_key))
    sides = {name: scores.get(name, SetScores()).membership.get(min_k, {}) for name in ("forget", "holdout")}
    if all(sides.values()):
        document["mia_min_k"] = {
            "k": min_k,
            "agg_value": _value(figures, "forget.min_k_auc"),
            **{side: _metric(rows, "score") for side, rows in sides.items()},
        }
    for key, name in (("forget_quality", "forget.quality"), ("model_utility", "utility.model_utility")):
        if name in figures:
            document[key] = {"agg_value": _value(figures, name)}
    forget = scores.get("forget", SetScores())
    if forget.has_losses:
        document[FILES["forget"]] = {
            "avg_gt_loss": dict(forget.loss),
            "avg_paraphrased_loss": {index: forget.correct_loss[index] for index in forget.wrong_losses},
            "average_perturb_loss": dict(forget.wrong_losses),
            "rougeL_recall": dict(forget.rouge),
        }
    return document


def encode_log(document: Mapping[str, object]) -> bytes:
    """Return a log as the bytes of its file; numbers that are not finite become null."""
    return (json.dumps(_finite(document), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _set_log(
    scores: SetScores, name: str, prefix: str, figures: Mapping[str, Figure], rouge_key: str
) -> dict[str, object]:
    # open-unlearning names the memorisation metrics of the forget set without its prefix, and asks the log of a
    # retain model for forget_truth_ratio while it calls the others *_Truth_Ratio.
    bare = "" if name == "forget" else f"{prefix}_"
    ratio_key = "forget_truth_ratio" if name == "forget" else f"{prefix}_Truth_Ratio"
    ratios = {index: math.exp(ratio) for index, ratio in scores.log_ratios("geometric").items()}
    metrics = {
        f"{prefix}_token_prob": _metric(scores.token_prob, "prob", _value(figures, f"{name}.token_prob")),
        f"{prefix}_Q_A_Prob": _losses(scores.loss, _value(figures, f"{name}.prob")),
        f"{prefix}_Q_A_PARA_Prob": _losses(scores.correct_loss),
        f"{prefix}_Q_A_PERT_Prob": _losses(scores.wrong_losses),
        f"{prefix}_Q_A_Prob_normalised": _metric(scores.normalised, "prob"),
        f"{prefix}_Q_A_ROUGE": _metric(scores.rouge, rouge_key, _value(figures, f"{name}.rouge_l")),
        f"{bare}exact_memorization": _metric(scores.accuracy, "score", _value(figures, f"{name}.accuracy")),
        f"{bare}extraction_strength": _metric(scores.strength, "score", _value(figures, f"{name}.extraction_strength")),
        ratio_key: _metric(ratios, "score", _value(figures, f"{name}.truth_ratio")),
    }
    return {key: metric for key, metric in metrics.items() if metric["value_by_index"]}


def _value(figures: Mapping[str, Figure], name: str) -> float | None:
    return figures[name].value if name in figures else None


def _metric(rows: Mapping[str, float], key: str, value: float | None = None) -> dict[str, object]:
    mean = sum(rows.values()) / len(rows) if rows else None
    return {
        "agg_value": mean if value is None else value,
        "value_by_index": {index: {key: number} for index, number in rows.items()},
    }


def _losses(rows: Mapping[str, float] | Mapping[str, list[float]], value: float | None = None) -> dict[str, object]:
    entries: dict[str, dict[str, object]] = {}
    for index, loss in rows.items():
        probability = [math.exp(-one) for one in loss] if isinstance(loss, list) else math.exp(-loss)
        entries[index] = {"prob": probability, "avg_loss": loss}
    flat = [number for loss in rows.values() for number in (loss if isinstance(loss, list) else [loss])]
    mean = sum(math.exp(-number) for number in flat) / len(flat) if flat else None
    return {"agg_value": mean if value is None else value, "value_by_index": entries}
