"""What the metrics of gates need, and what of it a run offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.data.records import Row
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.methods.base import Method
from llmsurgery.methods.tasks import TASKS
from llmsurgery.run.choices import NAMES as ASKED
from llmsurgery.run.files import DATA_NAMES
from llmsurgery.run.pairs import pair_needs
from llmsurgery.run.recover import recovery_needs
from llmsurgery.run.request import Request

if TYPE_CHECKING:
    from llmsurgery.data.pairs import Pair


def available_needs(
    method: Method,
    files: Mapping[str, Path],
    evaluation: EvaluationConfig,
    request: Request,
    pairs: Sequence[Pair],
) -> set[str]:
    """Return the needs of metrics that are met, those that the rows themselves meet left out."""
    if evaluation.figures == "edit":
        return pair_needs(method, pairs)
    given = {name for name in (*DATA_NAMES, *ASKED) if name in files} | {"whole"}
    given |= {"letters"} if "mcq" in files else set()
    if method.spec.pictures:
        given = given - {"mcq", "letters"} | {"pictures"}
    given |= recovery_needs(files, bool(request.judge)) if method.spec.models else set()
    given |= set(TASKS[method.spec.task].measures)
    given |= {"structured"} if method.spec.structured and evaluation.figures == "all" else set()
    return given | offered_needs(evaluation, bool(request.retain_model)) | pair_needs(method, pairs)


def offered_needs(evaluation: EvaluationConfig, retained: bool) -> set[str]:
    """Return the needs of metrics that are met by options other than data."""
    offered = {"retain-model": retained, "answers": evaluation.generate}
    offered["position-invariant"] = evaluation.position_invariant
    return {need for need, met in offered.items() if met}


def row_needs(rows: Mapping[str, Sequence[Row]], evaluation: EvaluationConfig) -> set[str]:
    """Return the needs of metrics that the rows themselves meet."""
    if not evaluation.truth_ratio:
        return set()
    return {f"perturbed:{name}" for name, members in rows.items() if any(row.perturbed_answers for row in members)}
