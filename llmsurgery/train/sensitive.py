"""Directions in which a loss is sensitive to the outputs, or the inputs, of linear layers.

With g_i [outputs, inputs] the gradient of the mean negative log-likelihood of the labelled tokens of row i:

    S_out = (1/m) sum_i g_i g_i^T [outputs, outputs],    S_in = (1/m) sum_i g_i^T g_i [inputs, inputs]
    d^T F d = (1/m) sum_i <g_i, d>^2 for a change d of the matrix, F the empirical Fisher information

Gradients of single rows, not of a batch: the square of their mean has rank one. Neither g_i nor S is ever formed. A
layer's gradient is D^T X, with X [tokens, inputs] its inputs and D [tokens, outputs] the gradients of its outputs; with
X^T = Q R it is D^T R^T Q^T, and so g g^T = (R D)^T (R D). The columns (R D)^T of all rows are gathered, and replaced by
their leading singular directions, each times its singular value, when there are many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from llmsurgery.compute.progress import Tick
from llmsurgery.data.chat import Encoded
from llmsurgery.data.collate import collate
from llmsurgery.train.fisher import Receive, caught, group_modules, units_backward

SIDES = ("out", "in")
KEPT = 64
"""Least number of directions that are kept of a side while rows are gathered; four times as many are gathered."""

GROUP_BYTES = 1 << 30
"""Directions of so many layers are gathered in one pass as fit into this."""


@dataclass(frozen=True, eq=False)
class Sensitive:
    """The most sensitive directions of one side of a layer.

    Attributes:
        basis: U, orthonormal columns [width, d], float64, on the CPU.
        values: Their eigenvalues of S, descending [d], float64.
        total: The trace of S.
    """

    basis: torch.Tensor
    values: torch.Tensor
    total: float


@dataclass(eq=False)
class Gathered:
    """Columns L with S = L L^T, or nearly: the weakest directions are dropped when there are many.

    Attributes:
        kept: Directions that are kept at least.
        columns: L [width, columns], fp32.
        total: The trace of S so far; nothing is dropped from it.
    """

    kept: int
    columns: torch.Tensor | None = None
    total: float = 0.0
    waiting: list[torch.Tensor] = field(default_factory=list)

    def add(self, columns: torch.Tensor) -> None:
        """Add columns [width, any], fp32."""
        self.total += float(columns.double().square().sum())
        self.waiting.append(columns)
        if sum(part.shape[1] for part in self.waiting) + self._width > 4 * self.kept:
            self._merge(self.kept)

    @property
    def _width(self) -> int:
        return 0 if self.columns is None else self.columns.shape[1]

    def _merge(self, count: int) -> torch.Tensor:
        """Replace all columns by their leading directions, and return the squares of their lengths, descending."""
        parts = self.waiting if self.columns is None else [self.columns, *self.waiting]
        whole = torch.cat(parts, dim=1)
        values, right = torch.linalg.eigh((whole.T @ whole).double())
        chosen: torch.Tensor = values.flip(0)[:count]
        self.columns = whole @ right.flip(1)[:, :count].to(whole.dtype)
        self.waiting = []
        return chosen

    def leading(self, count: int) -> Sensitive:
        """Return the strongest directions, fewer than asked for where there are fewer."""
        values = self._merge(max(count, self.kept))
        assert self.columns is not None
        real = int((values[:count] > 1e-9 * max(float(values[0]), 1e-300)).sum())
        basis, _ = torch.linalg.qr(self.columns[:, :real].double().cpu())
        return Sensitive(basis, values[:real].cpu(), self.total)


def gradient_columns(inputs: torch.Tensor, gradient: torch.Tensor, side: str) -> torch.Tensor:
    """Return L with L L^T = g g^T (side "out") or g^T g (side "in"), g = gradient^T inputs.

    Args:
        inputs: X [tokens, inputs], fp32.
        gradient: D [tokens, outputs], fp32.
        side: "out" or "in".
    """
    near, far = (gradient, inputs) if side == "out" else (inputs, gradient)
    triangle: torch.Tensor = torch.linalg.qr(far.T, mode="r").R
    return (triangle @ near).T


def sensitive_directions(
    model: PreTrainedModel,
    widths: Mapping[str, int],
    rows: Sequence[Encoded],
    pad_id: int,
    micro_batch: int,
    count: int,
    side: str,
    tick: Tick,
) -> dict[str, Sensitive]:
    """Return the most sensitive directions of one side of some linear layers.

    Args:
        model: A model in eval mode without trainable weights.
        widths: Path of each layer -> width of that side.
        rows: Encoded rows.
        pad_id: Token id for padding.
        micro_batch: Rows per forward.
        count: Directions of each layer.
        side: "out" or "in".
        tick: Told of every row; all rows are gone through once for every group of layers.
    """
    found: dict[str, Sensitive] = {}
    for group in layer_groups(widths, count):
        gathered = {name: Gathered(min(_kept(count), widths[name])) for name in group}

        def receive(
            name: str, inputs: torch.Tensor, gradient: torch.Tensor, gathered: dict[str, Gathered] = gathered
        ) -> None:
            for value, slope in zip(inputs, gradient, strict=True):
                gathered[name].add(gradient_columns(value.float(), slope.float(), side))

        _backward(model, group, rows, pad_id, micro_batch, receive, tick)
        found |= {name: gathered[name].leading(count) for name in group}
    return found


def _kept(count: int) -> int:
    return max(KEPT, 4 * count)


def layer_groups(widths: Mapping[str, int], count: int) -> Iterator[list[str]]:
    """Cut layers into groups whose columns fit into `GROUP_BYTES` together; arguments as above."""
    # Four times as many fp32 columns as are kept, and the rows that come on top.
    return group_modules({name: 20 * _kept(count) * width for name, width in widths.items()}, GROUP_BYTES)


Change = tuple[torch.Tensor, torch.Tensor]
"""A change of a matrix as B [outputs, r], scale included, and A [r, inputs]."""


def quadratic_forms(
    model: PreTrainedModel,
    changes: Mapping[str, Sequence[Change]],
    rows: Sequence[Encoded],
    pad_id: int,
    micro_batch: int,
    tick: Tick,
) -> dict[str, list[float]]:
    """Return d^T F d of low-rank changes d of some linear layers.

    Args:
        model: As for `sensitive_directions`.
        changes: Path of each layer -> changes of its matrix, float64.
        rows: Encoded rows.
        pad_id: Token id for padding.
        micro_batch: Rows per forward.
        tick: Told of every row.
    """
    placed = {name: [(b.to(model.device), a.to(model.device)) for b, a in own] for name, own in changes.items()}
    sums = {name: [0.0] * len(own) for name, own in changes.items()}

    def receive(name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        values, slopes = inputs.double(), gradient.double()
        for number, (second, first) in enumerate(placed[name]):
            # <D^T X, B A> = sum over tokens of (D B) . (X A^T)
            products = ((slopes @ second) * (values @ first.T)).sum((1, 2))
            sums[name][number] += float(products.square().sum())

    _backward(model, list(changes), rows, pad_id, micro_batch, receive, tick)
    return {name: [value / len(rows) for value in own] for name, own in sums.items()}


def _backward(
    model: PreTrainedModel,
    modules: Sequence[str],
    rows: Sequence[Encoded],
    pad_id: int,
    micro_batch: int,
    receive: Receive,
    tick: Tick,
) -> None:
    for start in range(0, len(rows), micro_batch):
        part = rows[start : start + micro_batch]
        batch = collate(part, pad_id, model.device)

        def handed(name: str, inputs: torch.Tensor, gradient: torch.Tensor, count: int = len(part)) -> None:
            # Some layers see the rows of a batch flattened into one.
            values, slopes = (part.reshape(count, -1, part.shape[-1]) for part in (inputs, gradient))
            receive(name, values, slopes)

        with caught(model, modules, handed):
            units_backward(model, batch, 1)
        tick(len(part))
