"""One training loop for every trained method."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from llmsurgery.compute.halving import free_memory, is_memory_error
from llmsurgery.errors import InputError, SurgeryError
from llmsurgery.train.config import TrainingConfig
from llmsurgery.train.gradients import accumulate, check_gradients, guard_loss
from llmsurgery.train.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from llmsurgery.train.session import MicroBatchError, Session
from llmsurgery.train.state import State, generator_states, pack_random, restore_generators, unpack_random
from llmsurgery.train.trainable import Trainable

StepLoss = Callable[[Sequence[int]], torch.Tensor]
"""Mean loss over the rows with these indices; called once per micro-batch."""

BeginStep = Callable[[Sequence[int]], None]
"""Takes the rows of a whole step before its first micro-batch."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        steps: Optimizer steps taken.
        stopped: "until", "max_steps" or "epochs".
        first_loss: Loss of the first step.
        last_loss: Loss of the last step.
        seconds: Wall time of this process.
        micro_batch: Rows per forward.
        observed: Last value of the figures that the loss told of.
        resumed: Step sizes that were changed when a run went on: `{"step", "lr", "clip"}` each.
    """

    steps: int
    stopped: str
    first_loss: float | None
    last_loss: float | None
    seconds: float
    micro_batch: int
    observed: Mapping[str, float] = field(default_factory=dict)
    resumed: Sequence[Mapping[str, object]] = ()

    def record(self) -> dict[str, object]:
        """Return the facts for the manifest."""
        facts: dict[str, object] = {
            "steps": self.steps,
            "stopped": self.stopped,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "micro_batch": self.micro_batch,
            **self.observed,
        }
        return {**facts, "resumed_with": list(self.resumed)} if self.resumed else facts


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
    session: Session,
    begin: BeginStep | None = None,
) -> TrainingResult:
    """Minimise a loss over rows, from a kept state of this stage if there is one.

    Args:
        trainable: What moves.
        loss: Mean loss of some rows; gradients of a step are averaged over its rows whatever their division into
            micro-batches.
        rows: Number of rows to draw from.
        config: Hyperparameters.
        session: Seed, micro-batch, stop rule, guard and kept states of the run.
        begin: Told of each step's rows, for a loss that draws or counts over a whole step.

    Raises:
        InputError: There are no rows.
        NoEffectError: No gradient reaches a trainable parameter on the first step.
        DivergedError: The loss or the gradient is NaN or Inf.
        MicroBatchError: An automatic micro-batch became too large after the first step.
    """
    if rows < 1:
        raise InputError("there are no rows to train on", "the forget set is empty after encoding", "")
    if config.lr is None:
        raise SurgeryError("the step size was not settled before training")
    loop = _Loop(trainable, rows, config, config.lr, session, begin)
    session.stage += 1
    started = time.perf_counter()
    with session.progress.task("training", loop.steps) as tick:
        if loop.step:
            tick(loop.step, "resumed")
        while not loop.stopped:
            value = loop.advance(loss)
            tick(note=f"loss {value:.4f}")
    return TrainingResult(
        loop.step,
        loop.stopped,
        loop.first_loss,
        loop.last_loss,
        time.perf_counter() - started,
        loop.micro_batch,
        dict(session.observed),
        loop.resumed,
    )


class _Loop:
    """The moving parts of one call of `train`; everything that a state must hold is an attribute."""

    def __init__(
        self,
        trainable: Trainable,
        rows: int,
        config: TrainingConfig,
        lr: float,
        session: Session,
        begin: BeginStep | None,
    ) -> None:
        from accelerate import Accelerator

        self.trainable, self.config, self.session, self.begin = trainable, config, session, begin
        self.steps = planned_steps(config, rows)
        self.batch_size = min(config.batch_size, rows)
        # A check scores every row once; forward and backward of a step cost about four times a forward of its rows.
        self.check_every = config.check_every or max(1, rows // (4 * self.batch_size))
        self.sampler = Sampler(rows, session.seed)
        guard = session.guard
        self.guard_sampler = None if guard is None else Sampler(len(guard.rows), session.seed + 1)
        self.step = 0
        self.stopped = "" if self.steps else self._end()
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.resumed: list[dict[str, object]] = []
        self.stage = session.stage
        self.due: State | None = None
        self.optimizer = make_optimizer(trainable.parameters, lr, config, trainable.factors)
        self.saved = state = session.store.load(self.stage) if session.store is not None else None
        if state is not None:
            self._restore(state)
        scheduler = self._scheduler(rows)
        # Not told the device, which is that of the model: its state outlives the run, and a later run may have another.
        self.accelerator = Accelerator(device_placement=False)
        self.prepared, self.scheduler = self.accelerator.prepare(self.optimizer, scheduler)

    def _scheduler(self, rows: int) -> torch.optim.lr_scheduler.LRScheduler:
        from transformers import get_scheduler

        config = self.config
        warmup = config.warmup_steps if config.warmup_steps >= 0 else max(2, math.ceil(rows / self.batch_size))
        name, further = "constant_with_warmup" if config.schedule == "constant" else config.schedule, None
        if name == "cosine" and self.session.lr_end:
            name, further = "cosine_with_min_lr", {"min_lr_rate": self.session.lr_end}
        scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            name,
            self.optimizer,
            num_warmup_steps=warmup,
            num_training_steps=self.steps,
            scheduler_specific_kwargs=further,
        )
        with warnings.catch_warnings():
            # It takes steps without the optimizer for a mistake; these are the ones before the kill.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(self.step):
                scheduler.step()
        return scheduler

    def _end(self) -> str:
        return "epochs" if self.config.epochs and self.steps != self.config.max_steps else "max_steps"

    def advance(self, loss: StepLoss) -> float:
        """Take one optimizer step, check the stop rule, keep a state when one is due; return the step's loss."""
        session, config = self.session, self.config
        if self.step == 0 and self.saved is None:
            self.due = self._snapshot()
        if session.renew_every and self.step % session.renew_every == 0:
            self.optimizer.state.clear()
        drawn = self.sampler.draw(self.batch_size)
        if self.begin is not None:
            self.begin(drawn)
        guard, sampler = session.guard, self.guard_sampler
        kept = sampler.draw(min(guard.config.batch_size, len(guard.rows))) if guard and sampler else []
        value = self._gradients(loss, drawn, kept)
        check_gradients(self.trainable.parameters, config.clip, self.step)
        self._keep()
        self.prepared.step()
        self.scheduler.step()
        self.prepared.zero_grad(set_to_none=True)
        self.first_loss = value if self.step == 0 else self.first_loss
        self.last_loss = value
        self.step += 1
        due = self.step % self.check_every == 0 or self.step == self.steps
        if due and session.reached is not None and session.reached(self.trainable.autocast):
            self.stopped = "until"
        elif self.step == self.steps:
            self.stopped = self._end()
        if self.stopped or (config.save_every and self.step % config.save_every == 0):
            self.due = self._snapshot()
        if self.stopped:
            self._keep()
        return value

    @property
    def micro_batch(self) -> int:
        return min(self.session.micro_batch or self.batch_size, self.batch_size)

    def _gradients(self, loss: StepLoss, drawn: Sequence[int], kept: Sequence[int]) -> float:
        """Leave the gradients of a step; an automatic micro-batch halves until the first step fits."""
        session = self.session
        while True:
            start = self._random_state() if session.automatic else None
            try:
                return self._accumulate_all(loss, drawn, kept)
            except (MemoryError, RuntimeError) as error:
                if start is None or self.micro_batch == 1 or not is_memory_error(error):
                    raise
            # Out of the handler: the traceback holds on to the tensors of the failed forward.
            self.prepared.zero_grad(set_to_none=True)
            free_memory()
            session.micro_batch = self.micro_batch // 2
            if self.step or self.stage:
                raise MicroBatchError(session.micro_batch)
            self._restore_random(*start)

    def _accumulate_all(self, loss: StepLoss, drawn: Sequence[int], kept: Sequence[int]) -> float:
        session, backward = self.session, self.accelerator.backward
        value = accumulate(backward, loss, drawn, [1] * len(drawn), self.micro_batch, self.step)
        if session.guard is not None:
            protect = partial(guard_loss, session.guard, self.trainable)
            # The divergence is a mean over labels, whatever the division into micro-batches.
            labels = [len(session.guard.hidden[i]) for i in kept]
            accumulate(backward, protect, kept, labels, session.micro_batch or len(kept), self.step)
        return value

    def _random_state(self) -> tuple[dict[str, torch.Tensor], list[Any], list[Any]]:
        return *generator_states(), pack_random(self.session.random)

    def _restore_random(self, tensors: dict[str, torch.Tensor], numbers: list[Any], own: list[Any]) -> None:
        restore_generators(tensors, numbers)
        unpack_random(self.session.random, own)

    def _snapshot(self) -> State | None:
        """Return what the next step changes before it moves a weight: orders, generators, counts."""
        if self.session.store is None or not self.config.save_every:
            return None
        tensors, numbers = generator_states()
        samplers = {"sampler": self.sampler, "guard": self.guard_sampler}
        tensors |= {f"order.{name}": s.generator.get_state() for name, s in samplers.items() if s is not None}
        tensors |= {f"carried.{name}": value.clone() for name, value in self.session.carried.items()}
        facts = {
            "step": self.step,
            "stopped": self.stopped,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "observed": dict(self.session.observed),
            "resumed": self.resumed,
            "lr": self.config.lr,
            "clip": self.config.clip,
            "micro_batch": self.session.micro_batch,
            "pending": {name: list(s.pending) for name, s in samplers.items() if s is not None},
            "random": pack_random(self.session.random),
            "generators": numbers,
        }
        return State(facts, tensors)

    def _keep(self) -> None:
        """Write the snapshot with the weights it belongs to.

        Called when loss and gradient at these weights have proved finite, so that a kept state is a good one, and
        before the step that moves them.
        """
        if self.due is None or self.session.store is None:
            return
        moments, plain = optimizer_tensors(self.optimizer)
        weights = {f"parameter.{i}": p.detach() for i, p in enumerate(self.trainable.parameters)}
        state = State({**self.due.facts, "optimizer": plain}, {**self.due.tensors, **moments, **weights})
        self.session.store.save(self.stage, state)
        self.due = None

    def _restore(self, state: State) -> None:
        facts = state.facts
        self.step, self.stopped = facts["step"], facts["stopped"]
        self.first_loss, self.last_loss = facts["first_loss"], facts["last_loss"]
        self.resumed = list(facts["resumed"])
        if self.session.automatic:
            self.session.micro_batch = facts["micro_batch"]
        if (facts["lr"], facts["clip"]) != (self.config.lr, self.config.clip) and not self.stopped:
            self.resumed.append({"step": self.step, "lr": self.config.lr, "clip": self.config.clip})
        with torch.no_grad():
            for index, parameter in enumerate(self.trainable.parameters):
                parameter.copy_(state.tensors[f"parameter.{index}"])
        restore_optimizer(self.optimizer, state.tensors, facts["optimizer"])
        for name, sampler in {"sampler": self.sampler, "guard": self.guard_sampler}.items():
            if sampler is not None:
                sampler.generator.set_state(state.tensors[f"order.{name}"])
                sampler.pending = list(facts["pending"][name])
        self.session.observed.update(facts["observed"])
        for name, value in self.session.carried.items():
            value.copy_(state.tensors[f"carried.{name}"])
        unpack_random(self.session.random, facts["random"])
        restore_generators(state.tensors, facts["generators"])
