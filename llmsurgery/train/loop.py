"""One training loop for every trained method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from llmsurgery.compute.progress import Progress
from llmsurgery.errors import DivergedError, InputError, NoEffectError, SurgeryError
from llmsurgery.train.config import TrainingConfig
from llmsurgery.train.guard import Guard
from llmsurgery.train.trainable import Trainable

StepLoss = Callable[[Sequence[int]], torch.Tensor]
"""Mean loss over the rows with these indices; called once per micro-batch."""


StopRule = Callable[[torch.dtype | None], bool]
"""Tells whether training may end; takes the dtype of matrix products if trained weights are wider, else None."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        steps: Optimizer steps taken.
        stopped: "until", "max_steps" or "epochs".
        first_loss: Loss of the first step.
        last_loss: Loss of the last step.
        seconds: Wall time.
    """

    steps: int
    stopped: str
    first_loss: float | None
    last_loss: float | None
    seconds: float


class Sampler:
    """Draws row indices: each row once per epoch, in an order that depends on the seed alone."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.generator = torch.Generator().manual_seed(seed)
        self.pending: list[int] = []

    def draw(self, count: int) -> list[int]:
        """Return `count` indices; a batch may reach into the next epoch."""
        while len(self.pending) < count:
            self.pending += torch.randperm(self.rows, generator=self.generator).tolist()
        drawn, self.pending = self.pending[:count], self.pending[count:]
        return drawn


def planned_steps(config: TrainingConfig, rows: int) -> int:
    """Return the number of optimizer steps at most."""
    if not config.epochs:
        return config.max_steps
    # Batches reach over the end of an epoch, so that every row is drawn equally often.
    steps = math.ceil(config.epochs * rows / min(config.batch_size, rows))
    return min(steps, config.max_steps) if config.max_steps else steps


def train(
    trainable: Trainable,
    loss: StepLoss,
    rows: int,
    config: TrainingConfig,
    seed: int,
    micro_batch: int | None,
    progress: Progress,
    reached: StopRule | None = None,
    guard: Guard | None = None,
) -> TrainingResult:
    """Minimise a loss over rows.

    Args:
        trainable: What moves.
        loss: Mean loss of some rows.
        rows: Number of rows to draw from.
        config: Hyperparameters.
        seed: Seed of the row order.
        micro_batch: Rows per forward, or None for the whole batch; gradients of a step are averaged over its rows
            whatever their division into micro-batches.
        progress: Told of every step.
        guard: Answers to keep; their divergence is added to every step.
        reached: Called every `check_every` steps; training ends when it returns True.

    Raises:
        InputError: There are no rows.
        NoEffectError: No gradient reaches a trainable parameter on the first step.
        DivergedError: The loss or the gradient is NaN or Inf.
    """
    from accelerate import Accelerator
    from transformers import get_scheduler

    if rows < 1:
        raise InputError("there are no rows to train on", "the forget set is empty after encoding", "")
    if config.lr is None:
        raise SurgeryError("the step size was not settled before training")
    steps = planned_steps(config, rows)
    batch_size = min(config.batch_size, rows)
    # A check scores every row once; forward and backward of a step cost about four times a forward of its rows.
    check_every = config.check_every or max(1, rows // (4 * batch_size))
    accelerator = Accelerator(cpu=trainable.parameters[0].device.type == "cpu", device_placement=False)
    optimizer = torch.optim.AdamW(trainable.parameters, lr=config.lr, weight_decay=config.weight_decay)
    warmup = config.warmup_steps if config.warmup_steps >= 0 else max(2, math.ceil(rows / batch_size))
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    sampler = Sampler(rows, seed)
    guard_sampler = None if guard is None else Sampler(len(guard.rows), seed + 1)
    losses: list[float] = []
    stopped = "epochs" if config.epochs and steps != config.max_steps else "max_steps"
    started = time.perf_counter()
    with progress.task("training", steps) as tick:
        for step in range(steps):
            drawn = sampler.draw(batch_size)
            losses.append(_accumulate(accelerator.backward, loss, drawn, micro_batch or batch_size, step))
            if guard is not None and guard_sampler is not None:
                kept = guard_sampler.draw(min(guard.config.batch_size, len(guard.rows)))
                _accumulate(accelerator.backward, partial(_guard_loss, guard, trainable), kept, len(kept), step)
            _check_gradients(trainable.parameters, config.clip, step)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            tick(note=f"loss {losses[-1]:.4f}")
            due = (step + 1) % check_every == 0 or step + 1 == steps
            if due and reached is not None and reached(trainable.autocast):
                stopped = "until"
                break
    return TrainingResult(
        steps=len(losses),
        stopped=stopped,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        seconds=time.perf_counter() - started,
    )


def _guard_loss(guard: Guard, trainable: Trainable, indices: Sequence[int]) -> torch.Tensor:
    return guard.loss(trainable.model, indices, trainable.autocast)


def _accumulate(
    backward: Callable[[torch.Tensor], None], loss: StepLoss, drawn: Sequence[int], micro_batch: int, step: int
) -> float:
    total = 0.0
    for start in range(0, len(drawn), micro_batch):
        part = drawn[start : start + micro_batch]
        value = loss(part) * (len(part) / len(drawn))
        total += float(value.detach())
        if not math.isfinite(total):
            raise _diverged(f"the loss is {total} at step {step + 1} (rows {', '.join(map(str, part))})")
        backward(value)
    return total


def _check_gradients(parameters: Sequence[torch.nn.Parameter], clip: float, step: int) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    if not bool(torch.isfinite(norm)):
        raise _diverged(f"the gradient is {float(norm)} at step {step + 1}")
    if step == 0 and float(norm) == 0.0:
        raise NoEffectError(
            "no gradient reaches the trainable parameters",
            "the loss does not depend on them, or every score is saturated",
            "choose other roles or layers (--set roles=..., --set layers=...)",
        )
    if clip > 0 and gradients:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)


def _diverged(what: str) -> DivergedError:
    return DivergedError(
        what, "training diverged", "lower the step size (--set lr=...), or compute in float32 (--dtype)"
    )
