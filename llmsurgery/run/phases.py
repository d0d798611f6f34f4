"""Trace what a run computes on tensors without data: the bytes of scoring, and of a step of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, cast

from llmsurgery.arch.spec import RoleTensor
from llmsurgery.data.records import Row
from llmsurgery.errors import SurgeryError
from llmsurgery.run.prepare import Prepared
from llmsurgery.train.config import TrainingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmsurgery.compute.memory import Ledger
    from llmsurgery.data.chat import Encoded


@dataclass(frozen=True)
class Shape:
    """A padded batch.

    Attributes:
        rows: Sequences.
        tokens: Tokens of the longest.
        labels: Labelled tokens of all.
    """

    rows: int
    tokens: int
    labels: int


def longest(rows: Sequence[Encoded], count: int, limit: int | None = None) -> Shape:
    """Return the shape of a batch of the longest rows."""
    order = sorted(rows, key=lambda row: -len(row.ids))[:count]
    tokens = max((len(row.ids) for row in order), default=1)
    return Shape(len(order), min(tokens, limit or tokens), sum(min(row.labels, limit or tokens) for row in order))


@dataclass(frozen=True)
class Scored:
    """Bytes of scoring, on top of the weights.

    Attributes:
        weights: Bytes of the weights.
        kept: Hidden states of the text and the head, which later figures are compared with.
        before: Peak on the source.
        after: Peak on the result, what is kept included.
    """

    weights: int
    kept: int
    before: int
    after: int


def trace_scoring(prepared: Prepared, model: PreTrainedModel) -> Scored:
    """Trace the scoring of rows and text.

    Args:
        prepared: The checked request.
        model: The model without weights; it is not fit for other use afterwards.
    """
    import torch

    from llmsurgery.compute.head import backbone, label_log_probabilities, label_statistics, mean_kl, read_head
    from llmsurgery.compute.memory import pretend

    data, size = prepared.measured, prepared.evaluation.batch_size
    rows = [row for sets in (*data.encoded.values(), *data.whole.values()) for row in sets]
    rows += [row for sets in data.wrong.values() for many in sets.values() for row in many]
    rows += [*(data.letters.prompts if data.letters else ()), *(data.stereotypes.encoded if data.stereotypes else ())]
    with pretend(model, prepared.device) as ledger, torch.no_grad(), ledger:
        weights, head = ledger.live, read_head(model)
        if rows:
            hidden, labels = _forward(model, longest(rows, size), prepared.device)
            label_statistics(hidden, head, labels)
            del hidden, labels
        if answers := _answers(prepared):
            ids = torch.zeros(answers.rows, answers.tokens, dtype=torch.long, device=prepared.device)
            # The cache of keys and values of whole answers.
            output = backbone(model)(input_ids=ids, use_cache=True)
            del output
        if not data.texts:
            return Scored(weights, 0, ledger.peak - weights, ledger.peak - weights)
        text = longest(data.texts, size)
        states, labels = _forward(model, text, prepared.device)
        total = sum(len(row.ids) - 1 for row in data.texts)
        own = torch.empty(total, states.shape[1], dtype=states.dtype, device=prepared.device)
        del states, labels
        one = own[: text.tokens - 1]
        label_log_probabilities(one, head, torch.zeros(len(one), dtype=torch.long, device=prepared.device))
        kept_head = head.clone()
        before, kept = ledger.peak, ledger.live
        earlier = torch.empty_like(own)
        mean_kl(earlier[: len(one)], one, kept_head, head)
        # Forwards on the result run while what is kept of the source is there.
        after = max(ledger.peak, before + kept - weights)
    return Scored(weights, kept - weights, before - weights, after - weights)


def _answers(prepared: Prepared) -> Shape | None:
    """Return the shape of the longest answers at their end, None if nothing is answered."""
    config, data = prepared.evaluation, prepared.measured
    if not config.generate:
        return None
    shapes = []
    for rows in data.encoded.values():
        found = longest(rows, config.batch_size)
        new = config.generation_tokens
        if config.protocol == "own":
            new = min(new, 2 * max((row.labels for row in rows), default=0))
        shapes.append(Shape(found.rows, found.tokens + new, 0))
    return max(shapes, key=lambda shape: shape.rows * shape.tokens, default=None)


@dataclass(frozen=True)
class Step:
    """Bytes of training.

    Attributes:
        values: Weights and adapters.
        moving: Number of entries that move.
        largest: Entries of the largest tensor that moves.
        kept: What the guard compares with.
        peak: Peak of forward and backward on top of all that, gradients included.
        sequences: Sequences that were traced at once.
        tokens: Tokens of the longest.
    """

    values: int
    moving: int
    largest: int
    kept: int
    peak: int
    sequences: int
    tokens: int


def trace_step(
    prepared: Prepared, model: PreTrainedModel, training: TrainingConfig, targets: Sequence[RoleTensor]
) -> Step:
    """Trace forward and backward of the longest micro-batch, and of the guard.

    Args:
        prepared: The checked request.
        model: The model without weights; it is not fit for other use afterwards.
        training: Hyperparameters.
        targets: The stored tensors that move.
    """
    import torch

    from llmsurgery.compute.divergence import divergence
    from llmsurgery.compute.head import label_log_probabilities, read_head

    batch = min(training.batch_size, len(_trained_rows(prepared)))
    given = prepared.request.batch_size
    micro = min(given, batch) if isinstance(given, int) else batch
    shapes = _shapes(prepared, micro, training.max_length)
    with _moving(prepared, model, training, targets) as (ledger, parameters, autocast), ledger:
        values = ledger.live
        guard, positions = _guard(prepared)
        head = read_head(model)
        reference = torch.empty(positions, head.weight.shape[1], dtype=prepared.dtype, device=prepared.device)
        kept_head = head.clone() if guard.rows else None
        kept = ledger.live - values
        # A second micro-batch runs beside the gradients of the first.
        for _ in range(2 if micro < batch else 1):
            loss = torch.zeros((), device=prepared.device)
            for shape in shapes:
                hidden, labels = _forward(model, shape, prepared.device, autocast)
                loss = loss + label_log_probabilities(hidden, head, labels).mean()
                del hidden, labels
            torch.autograd.backward(loss)
            del loss
        if kept_head is not None:
            hidden, _ = _forward(model, guard, prepared.device, autocast)
            protected = divergence(hidden.to(reference.dtype), head, reference[: guard.labels], kept_head)
            torch.autograd.backward(protected.mean())
        peak = ledger.peak - values - kept
    sizes = [parameter.numel() for parameter in parameters]
    sequences, tokens = sum(shape.rows for shape in shapes), max(shape.tokens for shape in shapes)
    return Step(values, sum(sizes), max(sizes), kept, peak, sequences, tokens)


def _trained_rows(prepared: Prepared) -> Sequence[Encoded]:
    """Return the forget rows; of a method without, what it prepared are the rows that it trains on, or has them."""
    rows: Sequence[Encoded] = prepared.measured.encoded.get("forget", ())
    if "forget" in prepared.method.spec.needs:
        return rows
    own = getattr(prepared.method, "trained_rows", None)
    return cast("Sequence[Encoded]", prepared.data if own is None else own(prepared.data))


def _shapes(prepared: Prepared, micro: int, limit: int) -> list[Shape]:
    """Return the batches whose activations are alive at once: forget rows, and as many retain rows if there are any."""
    spec, data = prepared.method.spec, prepared.measured.encoded
    forget = longest(_trained_rows(prepared), micro, limit)
    times = spec.sequences
    shapes = [Shape(forget.rows * times, forget.tokens, forget.labels * times)]
    if "retain" in (*spec.needs, *spec.uses) and data.get("retain"):
        shapes.append(longest(data["retain"], micro, limit))
    return shapes


@contextmanager
def _moving(
    prepared: Prepared, model: PreTrainedModel, training: TrainingConfig, targets: Sequence[RoleTensor]
) -> Iterator[tuple[Ledger, list[torch.nn.Parameter], torch.dtype | None]]:
    """Make a model without weights trainable, as `prepare_trainable` does with a loaded one."""
    import torch

    from llmsurgery.compute.memory import pretend
    from llmsurgery.train.experts import attach_experts
    from llmsurgery.train.trainable import prepare_trainable, recompute_activations

    device = prepared.device
    if training.train == "lora":
        with prepare_trainable(model, targets, training, _no_values), pretend(model, device) as ledger:
            yield ledger, [parameter for parameter in model.parameters() if parameter.requires_grad], None
        return
    plain = [target for target in targets if target.fused is None]
    wider = {f"{target.module}.{target.part}" for target in plain}
    with pretend(model, device, wider) as ledger:
        moving = [model.get_submodule(target.module).get_parameter(target.part) for target in plain]
        experts = {t: torch.empty(t.shape, device=device) for t in targets if t.fused is not None}
        for parameter in moving:
            parameter.requires_grad_(True)
        with ledger:
            moving += attach_experts(model, experts).values()
        if training.gradient_checkpointing:
            recompute_activations(model)
        model.train()
        autocast = prepared.dtype if plain and prepared.dtype != torch.float32 else None
        yield ledger, list(dict.fromkeys(moving)), autocast


def _no_values(name: str) -> NoReturn:
    raise SurgeryError(f"tensor {name} was read in a dry run")


def _forward(
    model: PreTrainedModel, shape: Shape, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return final hidden states [labels, width] and labels [labels] of a batch of some shape."""
    import torch

    from llmsurgery.compute.head import final_hidden

    ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.long, device=device)
    places = torch.zeros(shape.labels, dtype=torch.long, device=device)
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        hidden = final_hidden(model, ids, torch.ones_like(ids))
    hidden = hidden if autocast is None else hidden.to(autocast)
    return hidden[places, places], places


def _guard(prepared: Prepared) -> tuple[Shape, int]:
    """Return the guard's micro-batch and the number of positions it keeps; no rows without a guard."""
    if prepared.guard == "none":
        return Shape(0, 0, 0), 0
    config, given = prepared.guarding, prepared.request.batch_size
    size = min(given, config.batch_size) if isinstance(given, int) else config.batch_size
    if prepared.guard == "file":
        from llmsurgery.train.guard import encode_guard

        rows = [part for row in prepared.rows["guard"] for part in encode_guard(prepared.encoder, row)]
        return longest(rows, size), sum(row.labels for row in rows)
    # What is drawn is not known yet: count with the longest that may be.
    short = prepared.encoder.encode(Row("qa", "x", "x"))
    tokens = len(short.ids) + config.question_tokens + config.answer_tokens
    size = min(size, config.prompts)
    return Shape(size, tokens, size * config.answer_tokens), config.prompts * config.answer_tokens


def trace_windows(
    prepared: Prepared, model: PreTrainedModel, rows: int, tokens: int, targets: Sequence[RoleTensor] = ()
) -> int:
    """Return the peak of a forward of some windows on top of the weights, in bytes.

    Args:
        prepared: The checked request.
        model: The model without weights; it is not fit for other use afterwards.
        rows: Windows.
        tokens: Tokens of each.
        targets: Matrices whose gradients are handed over one by one in a backward; none for a forward alone.
    """
    import torch

    from llmsurgery.compute.head import label_log_probabilities, read_head
    from llmsurgery.compute.memory import pretend
    from llmsurgery.train.weight_gradients import handed_gradients

    shape = Shape(rows, tokens, rows * (tokens - 1))
    with pretend(model, prepared.device) as ledger, torch.set_grad_enabled(bool(targets)), ledger:
        weights = ledger.live
        if not targets:
            _forward(model, shape, prepared.device)
            return ledger.peak - weights
        with handed_gradients(model, targets, lambda _target, _gradient: None):
            hidden, labels = _forward(model, shape, prepared.device)
            torch.autograd.backward(-label_log_probabilities(hidden, read_head(model), labels).mean())
        return ledger.peak - weights
