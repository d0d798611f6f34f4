"""The hyperparameters of a value that is found by descent. No heavy import: `llmsurgery methods` reads this."""

from __future__ import annotations

from dataclasses import dataclass

from llmsurgery.train.config import option


@dataclass(frozen=True)
class ValueConfig:
    """How the vector is found that makes a model say something at one token."""

    value_steps: int = option(20, "steps of Adam at most that look for the value", minimum=1)
    value_lr: float = option(0.5, "step size of Adam on the value", minimum=0)
    value_decay: float = option(0.5, "weight of |delta| / |v0|^2", minimum=0)
    value_kl: float = option(0.0625, "weight of the divergence on '{subject} is a'; 0: no such prompt", minimum=0)
    value_clamp: float = option(4.0, "longest delta, in lengths of the present value", minimum=0)
    value_tolerance: float = option(0.05, "loss below which the search ends", minimum=0)
