"""What a trained method is given by the run: the stop rule, the guard and kept statistics."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llmsurgery.compute.progress import Progress
from llmsurgery.evaluate.gates import Gate
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.resume import source_identity

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmsurgery.compute.cache import StatisticsCache
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.train.guard import Guard
    from llmsurgery.train.session import Session, StopRule
    from llmsurgery.train.state import StateStore

STOP_ROWS = 256
"""Forget rows that `--until` is measured on at most."""


def make_session(
    prepared: Prepared, model: PreTrainedModel, before: Measurement, progress: Progress, store: StateStore
) -> Session:
    """Return what training is given beside its hyperparameters.

    Args:
        prepared: The checked request.
        model: The live model, unchanged so far.
        before: Figures before the operation.
        progress: Told of long work.
        store: Where states are kept.
    """
    from llmsurgery.train.session import Session

    request = prepared.request
    return Session(
        seed=request.seed,
        micro_batch=request.batch_size,
        progress=progress,
        reached=stop_rule(prepared, model, before),
        guard=make_guard_of(prepared, model, progress),
        store=store,
    )


def make_statistics(prepared: Prepared) -> StatisticsCache:
    """Return where statistics of the source are kept, by what decides their values."""
    from llmsurgery.compute.cache import StatisticsCache

    checkpoint = prepared.checkpoint
    source = [str(checkpoint.root.resolve()), source_identity(checkpoint), dict(checkpoint.config)]
    return StatisticsCache(json.dumps(source, sort_keys=True), str(prepared.device), str(prepared.dtype))


def make_guard_of(prepared: Prepared, model: PreTrainedModel, progress: Progress) -> Guard | None:
    """Draw or read what the guard protects, and record the unchanged model's answers."""
    from llmsurgery.train.guard import draw_rows, make_guard

    if prepared.guard == "none":
        return None
    if prepared.guard == "file":
        rows = list(prepared.rows["guard"])
    else:
        forget = prepared.rows["forget"]
        rows = draw_rows(model, prepared.encoder, forget, prepared.guarding, prepared.request.seed, progress)
    return make_guard(model, prepared.encoder, rows, prepared.guarding, progress)


def stop_rule(prepared: Prepared, model: PreTrainedModel, before: Measurement) -> StopRule | None:
    """Return what `--until` asks during training, or None without a rule.

    Args:
        prepared: The checked request.
        model: The live model.
        before: Figures before the operation, which relative bounds refer to.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.evaluate.likelihood import answer_probability, score_rows, token_probability

    rule: Gate | None = prepared.until
    if rule is None:
        return None
    metric = rule.metric
    encoded = prepared.measured.encoded["forget"][:STOP_ROWS]
    batch_size, pad_id = prepared.evaluation.batch_size, prepared.encoder.pad_id

    def score(autocast: torch.dtype | None) -> float:
        scores = score_rows(model, encoded, pad_id, batch_size, Silent(), "", autocast)
        if metric == "forget.prob":
            values = [answer_probability(row) for row in scores]
        else:
            values = [token_probability(row, given) for row, given in zip(scores, encoded, strict=True)]
        return sum(values) / len(values)

    # The bound `0.2x` is relative to the same rows that are watched.
    watched_all = len(encoded) == len(prepared.measured.encoded["forget"])
    baseline = before.figures[metric].number if watched_all else score(None)

    def reached(autocast: torch.dtype | None) -> bool:
        training = model.training
        model.eval()
        value = score(autocast)
        model.train(training)
        return rule.holds(value, baseline)

    return reached
