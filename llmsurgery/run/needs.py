"""What metrics need beside names of data, and what identifies data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmsurgery.checkpoint import file_digest
from llmsurgery.data.records import Row, rows_digest
from llmsurgery.evaluate.config import EvaluationConfig


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


def data_digest(path: Path, rows: Sequence[object]) -> str:
    """Return the SHA-256 of a data file, or of the rows of a data set that is no file."""
    return file_digest(path) if path.is_file() else rows_digest(rows)
