"""What a run gives to training beside the hyperparameters: seed, micro-batch, stop rule, guard, and kept states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from llmsurgery.compute.progress import Progress, Silent
from llmsurgery.train.guard import Guard
from llmsurgery.train.state import StateStore

StopRule = Callable[[torch.dtype | None], bool]
"""Tells whether training may end; takes the dtype of matrix products if trained weights are wider, else None."""


class MicroBatchError(Exception):
    """Memory ran out after a step was taken; training is to start again with the smaller micro-batch.

    Going on would end in other bits than a run that has the smaller micro-batch from its start, and could not be
    repeated with one number. Raised under an automatic micro-batch alone.

    Args:
        micro_batch: The smaller one.
    """

    def __init__(self, micro_batch: int) -> None:
        super().__init__(f"out of memory after the first step; {micro_batch} rows per forward may fit")
        self.micro_batch = micro_batch


@dataclass
class Session:
    """The training of one run, which may be several calls of `train`, one after the other.

    Attributes:
        seed: Seed of everything random.
        micro_batch: Rows per forward, or None for a whole batch.
        automatic: Whether the micro-batch halves when memory runs out.
        progress: Told of every step.
        reached: Tells whether the stop rule holds on the live model; None without a rule.
        guard: Answers that are not to change; None without a guard.
        store: Where states are kept, so that a killed run can go on; None keeps none.
        renew_every: Steps after which the optimizer forgets its moments; 0: never.
        lr_end: Share of the step size that a cosine schedule ends at.
        random: Random numbers for the method's own use; kept in the state.
        observed: Last value of what the method's loss tells of itself; kept in the state.
        carried: Tensors of the method that change in training, by name; they are kept in the state, and restored in
            place.
        stage: Number of calls of `train` so far.
    """

    seed: int = 0
    micro_batch: int | None = None
    automatic: bool = False
    progress: Progress = field(default_factory=Silent)
    reached: StopRule | None = None
    guard: Guard | None = None
    store: StateStore | None = None
    renew_every: int = 0
    lr_end: float = 0.0
    random: random.Random = field(init=False)
    observed: dict[str, float] = field(default_factory=dict)
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    stage: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def observe(self, **values: float) -> None:
        """Keep the last value of some figures of the loss, for the manifest."""
        self.observed.update(values)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Switch stop rule and guard off, for the training of something else than the model they watch."""
        kept = self.reached, self.guard
        self.reached = self.guard = None
        try:
            yield
        finally:
            self.reached, self.guard = kept
