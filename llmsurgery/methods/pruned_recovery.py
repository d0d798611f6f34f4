"""Training of a model that was made smaller: the model in memory, what it trains on, and what its weights become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation
from llmsurgery.methods.pruning import answers_and_text, tell_of_repeats
from llmsurgery.train.config import TrainingConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit, Slice
    from llmsurgery.train.trainable import ReadTensor


@dataclass(frozen=True)
class Recovered:
    """What recovery left.

    Attributes:
        edits: What it makes of the weights, in the shapes of the smaller model.
        record: Facts for the manifest.
        check: Compares the stored result with the model in training, and tells where they differ.
    """

    edits: Sequence[Edit]
    record: Mapping[str, object]
    check: Callable[[PreTrainedModel], None]


def recovery_rows(training: TrainingConfig, encoder: Encoder, rows: Sequence[Row]) -> list[Encoded]:
    """Return plain text in pieces of which every token counts, and other rows with their answers.

    Args:
        training: Length of a piece; without `epochs`, no more pieces are cut than the steps can take.
        encoder: The model's encoder.
        rows: The rows.

    Raises:
        InputError: A question or chat is too long.
    """
    from llmsurgery.data.windows import text_pieces

    count = None if training.epochs else training.max_steps * training.batch_size
    length = min(training.max_length, encoder.max_length)
    return answers_and_text(
        encoder, rows, training.max_length, lambda texts: text_pieces(encoder, texts, length, count)
    )


def shrink(
    model: PreTrainedModel, cut: Sequence[tuple[RoleTensor, Slice]], settings: Mapping[str, int]
) -> PreTrainedModel:  # fmt: skip
    """Return the model that the slices leave; the given one is of no use afterwards.

    Args:
        model: The loaded source.
        cut: The tensors that become smaller, each with its slice.
        settings: What config.json says of the result.
    """
    import torch

    from llmsurgery.compute.smaller import smaller_model

    kept = {f"{target.module}.{target.part}": (edit.axis, torch.from_numpy(edit.keep)) for target, edit in cut}
    return smaller_model(model, kept, settings)


def sliced_reader(read: ReadTensor, cut: Sequence[tuple[RoleTensor, Slice]]) -> ReadTensor:
    """Return what reads stored tensors as the slices leave them."""
    by_name = {edit.name: edit for _, edit in cut}

    def sliced(name: str) -> npt.NDArray[np.floating]:
        values = read(name)
        return values if name not in by_name else values.take(by_name[name].keep, by_name[name].axis)

    return sliced


def recover(
    operation: Operation,
    training: TrainingConfig,
    moved: Sequence[RoleTensor],
    cut: Sequence[tuple[RoleTensor, Slice]],
    settings: Mapping[str, int],
    rows: Sequence[Encoded],
) -> Recovered:
    """Train the smaller model on text.

    Args:
        operation: What the method was given; its model is of no use afterwards.
        training: Hyperparameters.
        moved: The tensors that move.
        cut: The tensors that became smaller, each with its slice.
        settings: What config.json says of the smaller model.
        rows: What is trained on.

    Raises:
        DivergedError: The loss became NaN or infinite.
    """
    from llmsurgery.methods.folding import folding_check
    from llmsurgery.train.loop import planned_steps, train
    from llmsurgery.train.losses import cross_entropy
    from llmsurgery.train.scorer import Scorer
    from llmsurgery.train.trainable import prepare_trainable
    from llmsurgery.train.width_loss import MEASURED_ROWS, plain_loss

    size, measured = operation.training.micro_batch or 4, rows[:MEASURED_ROWS]
    passes = planned_steps(training, len(rows)) * min(training.batch_size, len(rows)) / len(rows)
    tell_of_repeats(operation, passes)
    model = shrink(operation.model, cut, settings)
    with prepare_trainable(model, moved, training, sliced_reader(operation.read, cut)) as trainable:
        scorer = Scorer(trainable, operation.encoder.pad_id)
        with scorer.before_training():
            before = plain_loss(scorer, measured, size)
        loss = cross_entropy(scorer, rows)
        result = train(trainable, loss.value, len(rows), training, operation.training, loss.begin)
        model.eval()
        after = plain_loss(scorer, measured, size)
        edits = trainable.edits()
    if after > before:
        operation.progress.notice(
            f"recovery raised the loss on the first rows of --calibration from {before:.3f} to {after:.3f}: lower the "
            "step size (--set lr=...)"
        )
    record = {**result.record(), "rows": len(rows), "loss_pruned": before, "loss_recovered": after}
    return Recovered(edits, record, folding_check(operation, rows, after))
