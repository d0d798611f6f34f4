"""What a redirection is asked for: pairs from a file or from two texts, and what figures they allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmsurgery.data.pairs import Pair, make_pair, read_pairs
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError, UsageError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.methods.base import Method
from llmsurgery.run.request import Request

NEED = "pairs"


def wants_pairs(method: Method) -> bool:
    """Whether a method redirects."""
    return NEED in method.spec.needs


def requested_pairs(method: Method, config: object, request: Request, files: Mapping[str, Path]) -> list[Pair]:
    """Return the pairs of a request; none for a method that redirects nothing.

    Args:
        method: The method.
        config: Its resolved config.
        request: The request.
        files: Data name -> path, the demo's included.

    Raises:
        InputError: The file or the names are unusable.
        UsageError: Pairs are given twice.
    """
    if not wants_pairs(method):
        return []
    if request.concepts is None:
        pairs = read_pairs(files[NEED])
    elif NEED in request.data:
        raise UsageError("--from and --pairs are given", "both say what to redirect", "put all of it into the file")
    else:
        pairs = [make_pair(*request.concepts)]
    needs_target = getattr(method, "needs_target", None)
    wanted = not method.spec.targetless if needs_target is None else needs_target(config)
    if wanted and (lacking := [pair for pair in pairs if not pair.target]):
        where = lacking[0].where
        if request.concepts is not None:
            raise UsageError("--to is missing", f"{method.spec.name} redirects a name to another", "give both names")
        raise InputError(
            f"{where} has no `to`", f"{method.spec.name} redirects a name to another", "add it to the record"
        )
    return pairs


def pair_needs(method: Method, pairs: Sequence[Pair]) -> set[str]:
    """Return the needs of metrics that the pairs meet."""
    if method.spec.targetless:
        return {"concept"} if pairs else set()
    names = [pair for pair in pairs if pair.target and not pair.prompt]
    return ({NEED} if names else set()) | ({"aliases"} if any(pair.aliases for pair in names) else set())


def name_needs(pairs: Sequence[Pair], rows: Mapping[str, Sequence[Row]], evaluation: EvaluationConfig) -> set[str]:
    """Return the need of metrics that questions which hold an old name meet, among the rows that are answered."""
    from llmsurgery.evaluate.flips import holds_name

    if evaluation.protocol == "muse":
        return set()
    read = list(rows.get("forget", ()))[: evaluation.rows or None][: evaluation.generation_rows or None]
    return {"named"} if any(holds_name(row, pairs) for row in read) else set()


def require_figures(method: Method, evaluation: EvaluationConfig) -> None:
    """Refuse eval.figures=edit where there is nothing that the edited blocks alone would show.

    Raises:
        UsageError: The method cannot run on a streamed model.
    """
    if evaluation.figures == "streamed" and not method.spec.walks:
        raise UsageError(
            f"{method.spec.name} has no eval.figures=streamed", "it needs the whole model in memory", "drop the setting"
        )
    if evaluation.figures == "edit" and not method.spec.streams:
        raise UsageError(
            f"{method.spec.name} has no eval.figures=edit",
            "it needs the whole model, or its figures do",
            "drop the setting",
        )
