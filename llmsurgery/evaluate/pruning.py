"""Figures of a pruned model: how much of it is zero, how large and how fast it is, and its loss on ordinary text."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.head import backbone
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.data.chat import Encoded
from llmsurgery.evaluate.figures import Measurement
from llmsurgery.evaluate.intervals import Figure

SPEED_ROWS = 8
SPEED_REPEATS = 5


def with_pruning_figures(
    measured: Measurement,
    checkpoint: Checkpoint,
    model: PreTrainedModel | StreamedModel,
    texts: Sequence[Encoded],
    structured: bool,
) -> Measurement:
    """Add what pruning changes to the figures of a model.

    Args:
        measured: Its other figures.
        checkpoint: The files that it was loaded from: zeros and parameters are counted there.
        model: The model.
        texts: Ordinary text, for the speed.
        structured: Whether pruning makes matrices smaller or fewer; the speed is measured only then, and only of a
            loaded model.
    """
    entries, zeros = count_zeros(checkpoint)
    figures = {
        "size.sparsity": Figure(zeros / entries, entries, None),
        "size.params": Figure(float(entries), len(checkpoint.tensors), None),
    }
    if (perplexity := measured.figures.get("utility.ppl")) is not None:
        figures["utility.ce"] = cross_entropy(perplexity)
    if structured and not isinstance(model, StreamedModel):
        figures["speed.tokens_per_second"] = tokens_per_second(model, texts)
    return replace(measured, figures={**measured.figures, **figures})


def cross_entropy(perplexity: Figure) -> Figure:
    """Return the cross-entropy behind a perplexity, nats per token; so the ends of its interval map, too."""
    interval = perplexity.interval
    return Figure(
        math.log(perplexity.number),
        perplexity.n,
        None if interval is None else (math.log(interval[0]), math.log(interval[1])),
    )


def count_zeros(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the number of stored entries of floating-point tensors, and how many of them are zero."""
    entries = zeros = 0
    for name, info in checkpoint.tensors.items():
        if not info.dtype.startswith(("F", "BF")):
            continue
        entries += info.size
        for start, stop in checkpoint.row_blocks(name):
            raw = checkpoint.read(name, start, stop)
            bits = raw.view(f"<u{raw.dtype.itemsize}")
            # Shifting the sign out: -0.0 is a zero too.
            zeros += raw.size - int(np.count_nonzero(bits << bits.dtype.type(1)))
    return entries, zeros


@torch.inference_mode()
def tokens_per_second(model: PreTrainedModel, texts: Sequence[Encoded]) -> Figure:
    """Return how many tokens of a batch of texts the model reads a second: the fastest of a few forwards."""
    rows = sorted(texts, key=lambda row: -len(row.ids))[:SPEED_ROWS]
    length = len(rows[-1].ids)
    ids = torch.tensor([row.ids[:length] for row in rows], device=model.device)
    best = math.inf
    for _ in range(SPEED_REPEATS):
        started = time.perf_counter()
        backbone(model)(input_ids=ids, use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        best = min(best, time.perf_counter() - started)
    return Figure(ids.numel() / best, SPEED_REPEATS, None)
