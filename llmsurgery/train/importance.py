"""How much a loss depends on single weights, from gradients of a few batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FORMS = ("taylor", "code", "paper", "obs")


class Importance:
    """Importance of the weights of one matrix, gathered over batches.

    With g_n the gradient of batch n of N, W the weights, all products elementwise:

        taylor   S = sum_n | g_n W + (g_n W)^2 / (2N) |
        code     S = sum_n | g_n W + (g_n W)^2 / (2N) + W^3 |
        paper    S = | mean_n(g_n) W + 1/2 mean_n((g_n W)^2) |
        obs      S = | -mean_n(g_n) W + 1/2 mean_n((g_n W)^2) |

    Args:
        form: One of `FORMS`.
        batches: N.
    """

    def __init__(self, form: str, batches: int) -> None:
        self.form, self.batches = form, batches
        self._first: torch.Tensor | None = None
        self._second: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, weight: torch.Tensor) -> None:
        """Take in the gradient of one batch; both [outputs, inputs], fp32."""
        product = gradient * weight
        if self.form in ("taylor", "code"):
            term = product + product.square() / (2 * self.batches)
            if self.form == "code":
                term += weight**3
            self._first = term.abs() if self._first is None else self._first.add_(term.abs())
            return
        squared = product.square()
        self._first = product if self._first is None else self._first.add_(product)
        self._second = squared if self._second is None else self._second.add_(squared)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the sums so far by name; none before the first gradient."""
        sums = {"first": self._first, "second": self._second}
        return {name: values for name, values in sums.items() if values is not None}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned."""
        self._first, self._second = state.get("first"), state.get("second")

    def value(self, weight: torch.Tensor) -> torch.Tensor:
        """Return S [outputs, inputs]; zeros if no gradient came."""
        if self._first is None:
            return torch.zeros_like(weight)
        if self._second is None:
            return self._first
        sign = -1 if self.form == "obs" else 1
        return (sign * self._first / self.batches + self._second / (2 * self.batches)).abs()


def guarded_gradient(
    gradient: torch.Tensor, general: torch.Tensor, penalty: float, rate: float, batches: int, odd: bool
) -> torch.Tensor:
    """Return the gradient of D-Pruner's refined loss, g + (2 lambda a^2 / N) G g g.

    Args:
        gradient: g.
        general: G, what the weights matter for in general.
        penalty: lambda.
        rate: a.
        batches: N.
        odd: G |g| g in place of G g g, which has one sign whatever that of g, and so shrinks a negative g.
    """
    factor = 2 * penalty * rate**2 / batches
    return gradient + factor * general * gradient * (gradient.abs() if odd else gradient)
