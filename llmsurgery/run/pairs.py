"""What a redirection is asked for: pairs from a file or from two texts, and what figures they allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmsurgery.data.pairs import Pair, make_pair, read_pairs
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.methods.base import Method
from llmsurgery.run.request import Request

NEED = "pairs"


def wants_pairs(method: Method) -> bool:
    """Whether a method redirects."""
    return NEED in method.spec.needs


def requested_pairs(method: Method, request: Request, files: Mapping[str, Path]) -> list[Pair]:
    """Return the pairs of a request; none for a method that redirects nothing.

    Args:
        method: The method.
        request: The request.
        files: Data name -> path, the demo's included.

    Raises:
        InputError: The file or the names are unusable.
        UsageError: Pairs are given twice.
    """
    if not wants_pairs(method):
        return []
    if request.concepts is None:
        return read_pairs(files[NEED])
    if NEED in request.data:
        raise UsageError("--from and --pairs are given", "both say what to redirect", "put all of it into the file")
    return [make_pair(*request.concepts)]


def pair_needs(pairs: Sequence[Pair]) -> set[str]:
    """Return the needs of metrics that the pairs meet."""
    names = [pair for pair in pairs if not pair.prompt]
    return ({NEED} if names else set()) | ({"aliases"} if any(pair.aliases for pair in names) else set())


def require_figures(method: Method, evaluation: EvaluationConfig) -> None:
    """Refuse eval.figures=edit where there is nothing that the edited blocks alone would show.

    Raises:
        UsageError: The method cannot run on a streamed model.
    """
    if evaluation.figures == "edit" and not method.spec.streams:
        raise UsageError(
            f"{method.spec.name} has no eval.figures=edit",
            "it needs the whole model, or its figures do",
            "drop the setting",
        )
