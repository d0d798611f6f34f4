"""Next-token training while the norms of a model are switched off, one event after the other.

With s_bt = s(x) of what the last norm reads, and m the mean of s over tokens that are neither the first of a window nor
the end token, without a gradient:

    L = CE + aux * mean over all (b, t) of (s_bt - m)^2

The second term flattens the norm of the last residual, the first position included, so that the last norm can go.
An event that is due waits as long as the cross-entropy is further above that before the last event than `max_rise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmsurgery.compute.fake_norms import OTHERS, REST, VALUES, FakeNorms
from llmsurgery.compute.head import label_log_probabilities
from llmsurgery.data.chat import Encoded
from llmsurgery.errors import DivergedError
from llmsurgery.train.norm_schedule import Event
from llmsurgery.train.scorer import Scorer
from llmsurgery.train.session import Session

SMOOTHING = 0.5
"""Share of the old value in the running cross-entropy that `max_rise` is held against."""

SWITCHES = {
    "mlp": (("norm.mlp", None), ("norm.mlp_post", None)),
    "qk": (("norm.attn", OTHERS), ("norm.q", None), ("norm.k", None)),
    "v": (("norm.attn", VALUES), ("norm.attn_post", None)),
    "final": (("norm.final", None),),
}
"""Kind of an event -> norms it switches, and which of their switches."""


def auxiliary_loss(spreads: torch.Tensor, ids: torch.Tensor, end_id: int) -> torch.Tensor:
    """Return mean (s - m)^2 [], with m the mean of s over tokens that are no first token and no end token.

    Args:
        spreads: s(x) of what the last norm reads [batch, time].
        ids: Token ids [batch, time].
        end_id: Token that ends a document.
    """
    ordinary = ids != end_id
    ordinary[:, 0] = False
    middle = spreads[ordinary].mean().detach() if bool(ordinary.any()) else spreads.mean().detach()
    return (spreads - middle).square().mean()


@dataclass(frozen=True)
class RemovalSettings:
    """What of a run's hyperparameters the loss needs.

    Attributes:
        aux: Weight of the auxiliary loss.
        momentum: Share of the old sigma at every step.
        max_rise: Rise of the cross-entropy, in nats, at which events wait; 0: never.
        max_steps: Optimizer steps.
    """

    aux: float
    momentum: float
    max_rise: float
    max_steps: int


class Removal:
    """The loss over windows, for `llmsurgery.train.loop.train`, that throws the switches as its steps begin.

    Args:
        scorer: Scores rows with the model in training.
        norms: The switches, attached.
        windows: Windows of equal length.
        events: Switches in order; none: ordinary training.
        settings: Hyperparameters.
        session: What changes in training is carried there.
    """

    def __init__(
        self,
        scorer: Scorer,
        norms: FakeNorms,
        windows: Sequence[Encoded],
        events: Sequence[Event],
        settings: RemovalSettings,
        session: Session,
    ) -> None:
        self.scorer, self.norms, self.windows = scorer, norms, windows
        self.events, self.settings, self.session = list(events), settings, session
        self.drawn: list[int] = []
        self.steps = torch.zeros((), dtype=torch.int64)
        self.delay = torch.zeros((), dtype=torch.int64)
        self.fired = torch.full((max(1, len(self.events)),), -1, dtype=torch.int64)
        # Sum and number of the step's cross-entropies; the running value, and that before the last event.
        self.losses = torch.tensor([0.0, 0.0, math.nan, math.nan], dtype=torch.float64)
        self.history = torch.full((settings.max_steps + 1, len(norms.norms)), math.nan, dtype=torch.float64)
        session.carried = {
            **norms.state.named(),
            "steps": self.steps,
            "delay": self.delay,
            "fired": self.fired,
            "losses": self.losses,
            "history": self.history,
        }

    def begin(self, drawn: Sequence[int]) -> None:
        """Close the step before, and throw the switches that are due."""
        self._close()
        self.drawn = list(drawn)
        self._throw()
        step = int(self.steps)
        if step < len(self.history):
            self.history[step] = self.norms.state.sigma[:, REST]
        self.steps += 1

    def __call__(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the loss of some windows of the step []."""
        norms, scorer = self.norms, self.scorer
        if list(rows) == self.drawn[: len(rows)]:
            # The first of the step, perhaps for the second time, with fewer rows at once.
            norms.forget_step()
            self.losses[:2] = 0
        encoded = [self.windows[row] for row in rows]
        ids = torch.tensor([row.ids for row in encoded], device=scorer.trainable.model.device)
        with norms.forward(ids, tracking=True):
            parts = scorer.labelled(encoded)
        loss = -label_log_probabilities(parts.hidden, scorer.head, parts.labels).mean()
        self.losses[0] += float(loss.detach()) * len(rows)
        self.losses[1] += len(rows)
        self.session.observe(cross_entropy=float(loss.detach()))
        if not self.settings.aux:
            return loss
        assert norms.final_spread is not None
        flat = auxiliary_loss(norms.final_spread, ids, norms.end_id)
        self.session.observe(auxiliary=float(flat.detach()))
        return loss + self.settings.aux * flat

    def finish(self) -> None:
        """Close the last step.

        Raises:
            DivergedError: Norms are left, because the loss rose and events waited.
        """
        self._close()
        left = [event for event, step in zip(self.events, self.fired.tolist(), strict=False) if step < 0]
        if left:
            raise DivergedError(
                f"{len(left)} of {len(self.events)} switches were not thrown within {int(self.steps)} steps",
                f"the cross-entropy stayed more than {self.settings.max_rise:g} above that before the last one, and "
                f"the schedule waited {int(self.delay)} steps",
                "give more steps or longer gaps (--set max_steps=..., pace=2), a larger step size (lr), or "
                "max_rise=0 to go on regardless",
            )

    def _close(self) -> None:
        """Let sigma and the running cross-entropy follow the step that has ended."""
        if not int(self.steps) or not float(self.losses[1]):
            return
        self.norms.end_step(self.settings.momentum)
        own = self.losses[0] / self.losses[1]
        old = self.losses[2]
        self.losses[2] = own if bool(old.isnan()) else SMOOTHING * old + (1 - SMOOTHING) * own
        self.losses[:2] = 0

    def _throw(self) -> None:
        now = int(self.steps) - int(self.delay)
        due = [
            number
            for number, (event, fired) in enumerate(zip(self.events, self.fired.tolist(), strict=False))
            if fired < 0 and event.step <= now
        ]
        if not due:
            return
        # NaN, before the first event, is never larger.
        if self.settings.max_rise and bool(self.losses[2] > self.losses[3] + self.settings.max_rise):
            self.delay += 1
            return
        self.losses[3] = self.losses[2]
        for number in due:
            self._apply(self.events[number])
            self.fired[number] = int(self.steps)

    def _apply(self, event: Event) -> None:
        state = self.norms.state
        if event.kind == "end":
            assert event.layer is not None
            state.ends[event.layer] = False
        elif event.kind == "first":
            state.special.fill_(False)
        else:
            for role, switch in SWITCHES[event.kind]:
                place = self.norms.place(role, event.layer)
                if place is not None:
                    self.norms.throw(place, switch)
                    if role != "norm.attn":
                        # What has no values of its own has one switch.
                        self.norms.throw(place)


def thrown_steps(removal: Removal) -> list[dict[str, object]]:
    """Return every event with the step before which it came."""
    return [
        {"step": step, "norm": event.kind, "block": event.layer}
        for event, step in zip(removal.events, removal.fired.tolist(), strict=False)
    ]


@torch.no_grad()
def window_losses(scorer: Scorer, norms: FakeNorms | None, windows: Sequence[Encoded], rows: int) -> list[float]:
    """Return the mean cross-entropy of each of some windows, without dropout.

    Args:
        scorer: Scores rows with the model.
        norms: The attached switches, None for a stock model.
        windows: Windows of equal length.
        rows: Windows per forward.
    """
    model = scorer.trainable.model
    training = model.training
    model.eval()
    values: list[float] = []
    for start in range(0, len(windows), rows):
        part = list(windows[start : start + rows])
        if norms is None:
            parts = scorer.labelled(part)
        else:
            with norms.forward(torch.tensor([row.ids for row in part], device=model.device), tracking=False):
                parts = scorer.labelled(part)
        scores = label_log_probabilities(parts.hidden, scorer.head, parts.labels)
        values += (-scores.view(len(part), -1).double().mean(1)).tolist()
    model.train(training)
    return values
