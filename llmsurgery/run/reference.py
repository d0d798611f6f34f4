"""Scores of a model that never saw the forget rows, for `forget.quality`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Progress
from llmsurgery.data.records import Row
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.run.encoding import encode_for_figures, make_encoder, require_known_tokens
from llmsurgery.run.source import stored_dtype

if TYPE_CHECKING:
    import torch

    from llmsurgery.evaluate.scores import SetScores
    from llmsurgery.run.suite import SuitePlan


def score_retain_model(
    checkpoint: Checkpoint,
    rows: Mapping[str, Sequence[Row]],
    config: EvaluationConfig,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
    suite: SuitePlan | None = None,
) -> dict[str, SetScores]:
    """Load a retain model, score the forget (and holdout) rows with its own tokenizer, and drop it.

    Args:
        checkpoint: The retain model.
        rows: Data name -> rows; only "forget" and "holdout" are read.
        config: Settled evaluation settings.
        device: Resolved device.
        dtype: As for operations.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of long work and notices.
        suite: A suite whose own rows are scored too.
    """
    from llmsurgery.compute.device import resolve_dtype
    from llmsurgery.compute.load import load_model
    from llmsurgery.evaluate.measure_sets import score_against

    encoder = make_encoder(checkpoint)
    data = encode_for_figures(encoder, {name: rows[name] for name in ("forget", "holdout") if name in rows}, config)
    if suite is not None:
        suite.encode(encoder, data, config)
    if not data.wrong and not data.whole:
        progress.notice(
            "the retain model adds no figure: no forget row has a perturbed_answer, and there is no --holdout"
        )
        return {}
    structure = detect(checkpoint.config, checkpoint.tensors)
    require_known_tokens(data, structure)
    wanted = resolve_dtype(dtype, stored_dtype(checkpoint), device)
    model = load_model(checkpoint.root, wanted, device, trust_remote_code, structure.family.buffers)
    return score_against(model, encoder, data, config, progress)
