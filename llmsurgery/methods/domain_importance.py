"""How much weights matter for a domain: the gradients of one pass over it, or of an SGD run whose weights are dropped.

Every gradient is used and freed before the next one exists: of two parameters never both are held. With `tune`, the
matrices move in memory by W <- W - a g~ as they get their gradients, as LOMO does; the gradient is cut to a global norm
first, for which each batch has a backward pass of its own, since no gradient is kept until the norm is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.errors import NoEffectError
from llmsurgery.methods.base import Operation

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.data.windows import Window
    from llmsurgery.methods.general_importance import General
    from llmsurgery.train.importance import Importance

STATES = 4
"""How often the sums are kept during a pass, so that a killed run goes on from them."""


@dataclass(frozen=True)
class DomainSettings:
    """How gradients become importance.

    Attributes:
        form: One of `llmsurgery.train.importance.FORMS`.
        batch: Windows per gradient.
        loss_scale: Factor of the loss.
        penalty: lambda of the refined loss.
        rate: a, its step size and that of tuning.
        odd: The refined loss has G |g| g.
        tune: Move the weights on the way.
        epochs: Passes over the windows.
        max_norm: Global norm that gradients are cut to; 0 for any.
        warmup: Share of the steps in which the step size grows; then it falls to 0.
        stage: Where the state of the pass is kept.
    """

    form: str
    batch: int
    loss_scale: float
    penalty: float
    rate: float
    odd: bool
    tune: bool
    epochs: int
    max_norm: float
    warmup: float
    stage: int


class DomainPass:
    """The pass over a domain.

    Args:
        settings: How gradients become importance.
        operation: What the method is given; with `tune` its model is changed in memory.
        targets: The matrices.
        windows: Text of the domain.
        guard: What the refined loss protects; None without one.
    """

    def __init__(
        self,
        settings: DomainSettings,
        operation: Operation,
        targets: Sequence[RoleTensor],
        windows: Sequence[Window],
        guard: General | None,
    ) -> None:
        from llmsurgery.train.importance import Importance

        self.settings, self.operation, self.targets, self.guard = settings, operation, targets, guard
        self.batches = [windows[i : i + settings.batch] for i in range(0, len(windows), settings.batch)]
        self.found = {target.stored: Importance(settings.form, len(self.batches)) for target in targets}
        self.steps = len(self.batches) * (settings.epochs if settings.tune else 1)
        self.losses: list[float] = []
        # Sizes of the gradients, and of what the refined loss adds to them.
        self.sizes = [0.0, 0.0]
        self._rate = settings.rate
        self._cut = 1.0

    def run(self) -> tuple[dict[str, Importance], dict[str, object]]:
        """Return the importance of every matrix by stored name, and what is to be known of the pass.

        Raises:
            NoEffectError: No gradient reaches any of them.
        """
        from llmsurgery.train.weight_gradients import handed_gradients

        model, settings = self.operation.model, self.settings
        done = self._load()
        every = max(1, -(-self.steps // STATES))
        with self.operation.progress.task("gradients of the domain", self.steps - done) as tick:
            for step in range(done, self.steps):
                if settings.tune:
                    self._prepare(step)
                with handed_gradients(model, self.targets, self._receive):
                    self.losses.append(self._backward(step))
                if (step + 1) % every == 0 or step + 1 == self.steps:
                    self._save(step + 1)
                tick()
        if self.sizes[0] == 0:
            raise NoEffectError(
                "no gradient reaches the matrices",
                "the loss on the domain does not depend on them",
                "choose other roles",
            )
        return self.found, self._record()

    def _backward(self, step: int) -> float:
        import torch

        from llmsurgery.train.weight_gradients import text_backward

        part = self.batches[step % len(self.batches)]
        return text_backward(self.operation.model, torch.tensor(part), self.settings.loss_scale)

    def _prepare(self, step: int) -> None:
        """Find the step size of a step, and by how much its gradient is cut."""
        from llmsurgery.train.weight_gradients import handed_gradients

        self._rate = self.settings.rate * scheduled(step, self.steps, self.settings.warmup)
        if not self.settings.max_norm:
            return
        squares = [0.0]

        def add(_target: RoleTensor, gradient: torch.Tensor) -> None:
            squares[0] += float(gradient.float().square().sum())

        with handed_gradients(self.operation.model, self.targets, add):
            self._backward(step)
        norm = squares[0] ** 0.5 / self.settings.loss_scale
        self._cut = min(1.0, self.settings.max_norm / norm) if norm > 0 else 1.0

    def _receive(self, target: RoleTensor, gradient: torch.Tensor) -> None:
        """Score a matrix by its gradient, and move it when tuning."""
        from llmsurgery.compute.view import weight_view
        from llmsurgery.train.importance import guarded_gradient

        settings = self.settings
        view = weight_view(self.operation.model, target).detach()
        weight = (view.T if target.transposed else view).float()
        own = gradient = gradient.float()
        if self.guard is not None:
            general = self.guard.of(target, weight)
            own = guarded_gradient(
                gradient, general, settings.penalty, self._rate, len(self.batches), settings.odd
            )  # fmt: skip
            self.sizes[1] += float((own - gradient).abs().sum())
        self.sizes[0] += float(gradient.abs().sum())
        self.found[target.stored].add(own, weight)
        if settings.tune:
            moved = weight - (self._rate * self._cut / settings.loss_scale) * own
            view.copy_(moved.T if target.transposed else moved)

    def _record(self) -> dict[str, object]:
        count = len(self.batches)
        record: dict[str, object] = {
            "domain_windows": sum(len(part) for part in self.batches),
            "window_tokens": len(self.batches[0][0]),
            "batch": self.settings.batch,
            "domain_loss": sum(self.losses[:count]) / count,
        }
        if self.settings.tune:
            record |= {"tuning_steps": self.steps, "tuned_domain_loss": sum(self.losses[-count:]) / count}
        if self.guard is not None:
            record["mean_change_by_the_refined_loss"] = self.sizes[1] / self.sizes[0]
        return record

    def _save(self, step: int) -> None:
        """Keep the sums, and the weights if they have moved."""
        from llmsurgery.compute.view import weight_view
        from llmsurgery.train.state import State

        store = self.operation.training.store
        if store is None:
            return
        tensors = {f"{part}.{name}": values for name, one in self.found.items() for part, values in one.state().items()}
        if self.settings.tune and step < self.steps:
            for target in self.targets:
                tensors[f"weight.{target.stored}"] = weight_view(self.operation.model, target).detach()
        store.save(self.settings.stage, State({"step": step, "losses": self.losses, "sizes": self.sizes}, tensors))

    def _load(self) -> int:
        """Take up what a killed run kept; return how many steps it had done."""
        from llmsurgery.compute.view import weight_view

        store = self.operation.training.store
        state = None if store is None else store.load(self.settings.stage)
        if state is None:
            return 0
        device = self.operation.model.device
        for target in self.targets:
            name = target.stored
            kept = {part: state.tensors.get(f"{part}.{name}") for part in ("first", "second")}
            self.found[name].restore({part: values.to(device) for part, values in kept.items() if values is not None})
            if (weight := state.tensors.get(f"weight.{name}")) is not None:
                weight_view(self.operation.model, target).detach().copy_(weight)
        self.losses, self.sizes = list(state.facts["losses"]), list(state.facts["sizes"])
        return int(state.facts["step"])


def scheduled(step: int, steps: int, warmup: float) -> float:
    """Return the share of the step size at a step: it grows linearly over the warm-up, and then falls to 0.

    Args:
        step: Number of the step, from 0.
        steps: All steps.
        warmup: Share of them in which it grows.
    """
    rising = warmup * steps
    return (step + 1) / (rising + 1) if step < rising else (steps - step) / max(1.0, steps - rising)
