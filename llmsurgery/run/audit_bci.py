"""`audit bci`: every answer's rarest span that the reference has, and the rows without a flagged one kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row
from llmsurgery.run.audit_figures import Found, quantiles

if TYPE_CHECKING:
    from llmsurgery.evaluate.bci import Reference, Spans
    from llmsurgery.run.audit import AuditRequest

MOST = 0.5
"""Share of flagged rows above which tau tells little."""


def audit_bci(
    request: AuditRequest,
    rows: Sequence[Row],
    references: Sequence[Row],
    vocabulary: int,
    encoder: Encoder,
    progress: Progress,
) -> Found:
    """Score answers by BCI.

    Args:
        request: The request.
        rows: Pairs, whose chosen answer decides, or rows with one answer.
        references: The corpus; prompts and answers are passages of it.
        vocabulary: Number of token ids.
        encoder: The model's encoder.
        progress: Told of long work and notices.
    """
    from llmsurgery.evaluate.bci import kept_weight, read_reference

    decisive = [encoder.text_ids(row.answer if row.preferred is None else row.preferred) for row in rows]
    rejected = [None if row.preferred is None else encoder.text_ids(row.answer) for row in rows]
    answers = [*decisive, *(ids for ids in rejected if ids is not None)]
    with progress.task("reading the reference", len(references)) as tick:

        def corpus() -> Iterator[list[int]]:
            for row in references:
                yield from (encoder.text_ids(text) for text in (row.prompt, row.answer, row.preferred) if text)
                tick()

        reference = read_reference(corpus(), answers, request.window, vocabulary)
    found = [_scored(ids, reference, request) for ids in decisive]
    others = [None if ids is None else _scored(ids, reference, request) for ids in rejected]
    flagged = [spans.highest is not None and spans.highest > request.tau for spans in found]
    pairs = any(ids is not None for ids in rejected)
    lines = [
        {
            "row": i,
            **{f"chosen_{name}" if pairs else name: value for name, value in dataclasses.asdict(spans).items()},
            **({} if other is None else {f"rejected_{key}": v for key, v in dataclasses.asdict(other).items()}),
            "flagged": flag,
            "weight": kept_weight(spans.highest, request.tau),
            "kept": not flag,
        }
        for i, (spans, other, flag) in enumerate(zip(found, others, flagged, strict=True))
    ]
    series: dict[str, list[float | None]] = {"chosen" if pairs else "answer": [spans.highest for spans in found]}
    if pairs:
        series["rejected"] = [None if other is None else other.highest for other in others]
    record: dict[str, object] = {
        "flagged": sum(flagged),
        "without_candidates": sum(spans.highest is None for spans in found),
        "shorter_than_a_window": sum(spans.tokens < request.window for spans in found),
        "quantiles": {name: quantiles(values) for name, values in series.items()},
        "reference": {"tokens": reference.tokens, "passages": reference.passages},
    }
    _tell(request, found, flagged, progress)
    return Found(lines, [i for i, flag in enumerate(flagged) if not flag], record, series, request.tau)


def _scored(ids: Sequence[int], reference: Reference, request: AuditRequest) -> Spans:
    from llmsurgery.evaluate.bci import score_spans

    return score_spans(ids, reference, request.window, request.most_found, request.every)


def _tell(request: AuditRequest, found: Sequence[Spans], flagged: Sequence[bool], progress: Progress) -> None:
    silent = sum(spans.highest is None for spans in found)
    if silent:
        progress.notice(
            f"{silent} of {len(found)} answers have no span that the reference holds up to {request.most_found} times: "
            "they pass unseen; a larger --reference, or --every-window, says more"
        )
    if sum(flagged) > MOST * len(found):
        progress.notice(
            f"tau={request.tau:g} flags {sum(flagged)} of {len(found)} rows: over {request.window} tokens it is "
            f"{request.tau / request.window:.1f} nats a token, which ordinary words pass; raise --tau by the quantiles"
        )
