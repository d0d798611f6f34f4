"""`audit ches`: every pair scored, and the lowest share of them kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmsurgery.arch.bundle import is_bundle
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import UnsupportedError
from llmsurgery.run.audit_figures import Found, mean_of, quantiles
from llmsurgery.run.encoding import require_embedded

if TYPE_CHECKING:
    from llmsurgery.run.audit import AuditRequest


def audit_ches(
    request: AuditRequest, rows: Sequence[Row], checkpoint: Checkpoint, encoder: Encoder, progress: Progress
) -> Found:
    """Score preference pairs by CHES.

    Args:
        request: The request.
        rows: Pairs: `answer` is the rejected one, `preferred` the chosen one.
        checkpoint: The model before training.
        encoder: Its encoder.
        progress: Told of long work and notices.

    Raises:
        UnsupportedError: The model is a bundle.
        InputError: A row does not fit into the model.
    """
    from llmsurgery.compute.device import memory_errors, resolve_device, resolve_dtype, suitable_threads
    from llmsurgery.compute.load import load_model
    from llmsurgery.evaluate.ches import hidden_sums, kept_pairs, similarity

    if is_bundle(checkpoint.config):
        raise UnsupportedError(
            f"{str(checkpoint.root)!r} is a bundle with model code of its own",
            "hidden states are read from a stock model",
            "audit with the model before surgery",
        )
    structure = detect(checkpoint.config, checkpoint.tensors)
    chosen = [_encoded(encoder, row, row.preferred, request.end) for row in rows]
    rejected = [_encoded(encoder, row, row.answer, request.end) for row in rows]
    require_embedded([*chosen, *rejected], structure)
    device = resolve_device(request.device)
    # Scores of pairs are compared with each other; half precision is used only on demand.
    dtype = resolve_dtype("float32" if request.dtype == "auto" else request.dtype, "F32", device)
    parameters = sum(info.size for info in checkpoint.tensors.values())
    with memory_errors(), suitable_threads(parameters, device):
        model = load_model(checkpoint.root, dtype, device, request.trust_remote_code, structure.family.buffers)
        sums = hidden_sums(model, [*chosen, *rejected], encoder.pad_id, request.batch_size, progress)
    found = [
        similarity(sums[i], sums[len(rows) + i], chosen[i].labels, rejected[i].labels) for i in range(len(rows))
    ]  # fmt: skip
    scores = [dataclasses.asdict(pair) for pair in found]
    kept = kept_pairs([score[request.score] for score in scores], request.keep)
    lines = _lines(rows, chosen, rejected, scores, set(kept))
    limit = max(float(scores[i][request.score]) for i in kept)
    both = "both_refuse"
    record: dict[str, object] = {
        "highest_kept": limit,
        "quantiles": {name: quantiles([score[name] for score in scores]) for name in ("ln_ches", "ches")},
        "all": _mix(lines),
        "kept_rows": _mix([lines[i] for i in kept]),
    }
    shares = [_mix(part)[both] for part in (lines, [lines[i] for i in kept])]
    progress.notice(
        f"the filter keeps {len(kept)} of {len(rows)} pairs; two refusals are {shares[0]} of all, {shares[1]} of these"
    )
    return Found(lines, kept, record, {request.score: [score[request.score] for score in scores]}, limit)


def _encoded(encoder: Encoder, row: Row, answer: str | None, end: bool) -> Encoded:
    encoded = encoder.encode(row, answer)
    if end or not encoded.ends:
        return encoded
    return Encoded(encoded.ids[:-1], encoded.answer_start, False, encoded.where)


def _lines(
    rows: Sequence[Row],
    chosen: Sequence[Encoded],
    rejected: Sequence[Encoded],
    scores: Sequence[Mapping[str, float]],
    kept: set[int],
) -> list[dict[str, object]]:
    """Return what is written of every pair: numbers, and no text."""
    from llmsurgery.evaluate.edit_distance import edit_distance
    from llmsurgery.evaluate.refusal import is_refusal

    return [
        {
            "row": i,
            **scores[i],
            "chosen_tokens": chosen[i].labels,
            "rejected_tokens": rejected[i].labels,
            "edit_distance": edit_distance(
                chosen[i].ids[chosen[i].answer_start :], rejected[i].ids[rejected[i].answer_start :]
            ),
            "chosen_refuses": is_refusal(row.preferred or ""),
            "rejected_refuses": is_refusal(row.answer),
            "kept": i in kept,
        }
        for i, row in enumerate(rows)
    ]


def _mix(lines: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return what pairs are like: how many refuse, lengths and distances on average."""
    sides = [(bool(line["chosen_refuses"]), bool(line["rejected_refuses"])) for line in lines]
    return {
        "pairs": len(lines),
        "both_refuse": sides.count((True, True)),
        "chosen_refuses": sides.count((True, False)),
        "rejected_refuses": sides.count((False, True)),
        "neither_refuses": sides.count((False, False)),
        **{name: mean_of(lines, name) for name in ("chosen_tokens", "rejected_tokens", "edit_distance")},
    }
