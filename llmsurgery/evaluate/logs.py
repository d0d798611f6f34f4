"""Reading published evaluation logs of TOFU in both layouts.

(a) open-unlearning's `TOFU_EVAL.json`: metric -> {"agg_value", "value_by_index": {"0": {"score": ...}}}.
(b) TOFU's `eval_log_aggregated.json`: file -> {"avg_gt_loss": {"0": ...}, "average_perturb_loss": {"0": [...]}, ...}.

Rows are objects keyed by row index, or lists in row order. Text in a log (prompts, generations) is never read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.errors import InputError
from llmsurgery.evaluate.scores import PerRow, SetScores

OPEN_UNLEARNING, TOFU = "open-unlearning", "tofu"

PREFIXES = {"forget": "forget", "retain": "retain", "authors": "ra", "facts": "wf"}
"""Set name -> prefix of open-unlearning's metric names."""

FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json",
}
"""Set name -> file name in TOFU's aggregated log."""

_DEFAULT_SHARE = 0.4
_EXPECTED = "expected open-unlearning's TOFU_EVAL.json or TOFU's eval_log_aggregated.json"


@dataclass(frozen=True)
class Log:
    """A log that was read.

    Attributes:
        path: Its file.
        layout: "open-unlearning" or "tofu".
        scores: Set name -> numbers per row.
    """

    path: Path
    layout: str
    scores: dict[str, SetScores]


def read_log(path: str | Path) -> Log:
    """Read a log of either layout.

    Raises:
        InputError: Missing, not JSON, of neither layout, or with a number where none can be; names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"log {path} does not exist", "no such file", "check the path")
    try:
        content: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"log {path} is not valid JSON", str(error), _EXPECTED) from error
    if not isinstance(content, dict):
        raise InputError(f"log {path} is not an object", f"found {type(content).__name__}", _EXPECTED)
    # Releases of open-unlearning differ in the case of some names (forget_truth_ratio, forget_Truth_Ratio).
    names = {str(key).lower(): value for key, value in content.items()}
    reader = _Reader(path, names)
    scores = {name: reader.open_unlearning(prefix) for name, prefix in PREFIXES.items()}
    scores["forget"], scores["holdout"] = reader.membership(scores["forget"])
    layout = OPEN_UNLEARNING
    if all(found == SetScores() for found in scores.values()):
        scores, layout = {name: reader.tofu(file) for name, file in FILES.items()}, TOFU
    scores = {name: found for name, found in scores.items() if found != SetScores()}
    if not scores:
        found = ", ".join(sorted(names)[:8]) or "no key"
        raise InputError(f"log {path} has no numbers per row", f"found {found}", _EXPECTED)
    return Log(path, layout, scores)


def read_retain_log(path: str | Path) -> Log:
    """Read the log of a model that never saw the forget rows.

    Raises:
        InputError: As for `read_log`, or the log has no truth ratios of forget rows.
    """
    log = read_log(path)
    if not log.scores.get("forget", SetScores()).has_ratios:
        raise InputError(
            f"log {path} has no truth ratios of the forget rows",
            "forget.quality compares these with the model's own",
            "evaluate the retain model on the forget rows with perturbed answers",
        )
    return log


class _Reader:
    """Picks columns of numbers out of a log."""

    def __init__(self, path: Path, names: Mapping[str, object]) -> None:
        self.path = path
        self.names = names

    def _column(self, rows: object, key: str, name: str) -> dict[str, object]:
        """Return row index -> value of `key`, rows without it left out."""
        if isinstance(rows, list):
            rows = {str(index): row for index, row in enumerate(rows)}
        if rows is None:
            return {}
        if not isinstance(rows, dict):
            raise InputError(f"log {self.path}: {name} holds no rows", f"found {type(rows).__name__}", _EXPECTED)
        values = {str(index): row.get(key) if isinstance(row, dict) else row for index, row in rows.items()}
        return {index: value for index, value in values.items() if value is not None}

    def _numbers(self, rows: object, key: str, name: str) -> dict[str, float]:
        return {index: self._number(value, index, name) for index, value in self._column(rows, key, name).items()}

    def _lists(self, rows: object, key: str, name: str) -> dict[str, list[float]]:
        column = self._column(rows, key, name)
        # A set with one wrong answer per row is logged without the list around it.
        lists = {index: value if isinstance(value, list) else [value] for index, value in column.items()}
        return {index: [self._number(one, index, name) for one in many] for index, many in lists.items() if many}

    def _number(self, value: object, index: str, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise InputError(f"log {self.path}: {name}, row {index} is not a number", f"found {value!r:.40}", "")
        return float(value)

    def _rows(self, name: str) -> object:
        metric = self.names.get(name.lower())
        if isinstance(metric, dict):
            return metric.get("value_by_index")
        return metric if isinstance(metric, list) else None

    def _metric(self, key: str, *names: str) -> dict[str, float]:
        """Return the rows of the first of several metric names that the log has."""
        columns = (self._numbers(self._rows(name), key, name) for name in names)
        return next((column for column in columns if column), {})

    def open_unlearning(self, prefix: str) -> SetScores:
        """Return one set of layout (a)."""
        wrong, rouge = f"{prefix}_Q_A_PERT_Prob", f"{prefix}_Q_A_ROUGE"
        loss = self._metric("avg_loss", f"{prefix}_Q_A_Prob")
        # open-unlearning names the memorisation metrics of the forget set without its prefix.
        bare = ("",) if prefix == "forget" else ()
        return SetScores(
            token_prob=self._metric("prob", f"{prefix}_token_prob"),
            loss=loss,
            rouge=self._metric("rougeL_recall", rouge) or self._metric("rougeL_f1", rouge),
            accuracy=self._metric("score", *(f"{start}exact_memorization" for start in (*bare, f"{prefix}_"))),
            strength=self._metric("score", *(f"{start}extraction_strength" for start in (*bare, f"{prefix}_"))),
            # Real authors and world facts have no paraphrase: the answer itself is the correct one.
            correct_loss=self._metric("avg_loss", f"{prefix}_Q_A_PARA_Prob")
            or (loss if prefix in ("ra", "wf") else {}),
            wrong_losses=self._lists(self._rows(wrong), "avg_loss", wrong),
            log_ratio=_logs(self._metric("score", f"{prefix}_Truth_Ratio")),
            normalised=self._metric("prob", f"{prefix}_Q_A_Prob_normalised"),
        )

    def membership(self, forget: SetScores) -> tuple[SetScores, SetScores]:
        """Add Min-K% scores of layout (a) to the forget set, and return the holdout set with its own."""
        metric = self.names.get("mia_min_k")
        if not isinstance(metric, dict):
            return forget, SetScores()
        sides = []
        for side in ("forget", "holdout"):
            part = metric.get(side)
            rows = part.get("value_by_index") if isinstance(part, dict) else part
            sides.append(self._numbers(rows, "score", f"mia_min_k.{side}"))
        if not all(sides):
            return forget, SetScores()
        first, second = ({_share(metric): side} for side in sides)
        return SetScores(**{**vars(forget), "membership": first}), SetScores(membership=second)

    def tofu(self, file: str) -> SetScores:
        """Return one set of layout (b)."""
        content = self.names.get(file)
        if not isinstance(content, dict):
            return SetScores()

        def column(key: str) -> dict[str, float]:
            return self._numbers(content.get(key), key, f"{file}, {key}")

        loss = column("avg_gt_loss")
        return SetScores(
            loss=loss,
            rouge=column("rougeL_recall"),
            correct_loss=column("avg_paraphrased_loss") or loss,
            wrong_losses=self._lists(content.get("average_perturb_loss"), "", f"{file}, average_perturb_loss"),
        )


def _share(metric: Mapping[str, object]) -> float:
    share = metric.get("k", _DEFAULT_SHARE)
    return float(share) if isinstance(share, int | float) else _DEFAULT_SHARE


def _logs(ratios: PerRow) -> dict[str, float]:
    return {index: math.log(ratio) if ratio > 0 else -math.inf for index, ratio in ratios.items()}
