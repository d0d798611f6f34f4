"""Writing what names mean into MLPs, layer by layer, for methods that redirect one name to another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmsurgery.methods.base import Operation

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.compute.directions import Directions
    from llmsurgery.compute.statistics import KeyStatistics
    from llmsurgery.data.contexts import Context
    from llmsurgery.edits.kinds import LowRank

ENOUGH = 0.9
"""Share of a residual that is to be written where lambda is left to the toolkit."""

FREE = (0.5, 0.995)
"""Share of the directions that tau should leave free; outside of it the trace decides."""

HELD = 0.99
"""Share of the trace that the protected directions hold then."""


@dataclass(frozen=True)
class Column:
    """One name and what it is to mean.

    Attributes:
        name: The name.
        keys: Contexts that its key is the mean over.
        values: Contexts that its current value is the mean over.
        targets: Contexts of the new name that the value to write is the mean over.
        found: Returns the value to write [width] after a block, given the current one, in place of a new name's.
    """

    name: str
    keys: Sequence[Context]
    values: Sequence[Context]
    targets: Sequence[Context] = ()
    found: Callable[[int, torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Free:
    """The directions of a layer's keys that an edit may use.

    Attributes:
        protected: Orthonormal columns [inputs, b] that it may not use.
        record: How they were found, for the manifest.
    """

    protected: torch.Tensor
    record: Mapping[str, object]


@dataclass(frozen=True)
class KeptFree:
    """The same, read from the cache whenever it is needed: three wide layers at once are gigabytes.

    Attributes:
        directions: The directions of the layer's keys.
        tau: Eigenvalues from which a direction is protected.
        record: How they were found, for the manifest.
    """

    directions: Directions
    tau: float
    record: Mapping[str, object]

    @property
    def protected(self) -> torch.Tensor:
        """Orthonormal columns [inputs, b] that the edit may not use."""
        return self.directions.protected(self.tau)


@dataclass
class Written:
    """What some neighbouring layers wrote.

    Attributes:
        edits: One edit per layer.
        layers: One record per layer.
        keys: Layer -> keys [inputs, names].
        weakest: Lowest share of a residual that was written, over layers and names.
        residual: |z* - z| over what it was before, mean over the names, after the last layer.
    """

    edits: list[LowRank] = field(default_factory=list)
    layers: list[dict[str, object]] = field(default_factory=list)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    weakest: float = 1.0
    residual: float = 1.0


def layer_of(target: RoleTensor) -> int:
    """Return the block of a matrix that is in one."""
    assert target.layer is not None
    return target.layer


def free_directions(statistics: KeyStatistics, tau: float) -> Free:
    """Return what ordinary text leaves free of a layer's keys.

    Args:
        statistics: Second moment of the layer's keys.
        tau: Eigenvalues from which a direction is protected; see `settle_tau`.
    """
    tau, record = settle_tau(statistics, tau)
    return Free(statistics.protected(tau).cpu(), record)


def settle_tau(statistics: KeyStatistics | Directions, tau: float) -> tuple[float, Mapping[str, object]]:
    """Return the eigenvalue from which a direction is protected, and what is to be said of it.

    Where tau leaves less than 50% or more than 99.5% of the directions, it is chosen so that the protected ones hold
    99% of the trace of E[k k^T].

    Args:
        statistics: Second moment of the layer's keys, or its directions.
        tau: What is asked for; 0 protects nothing.
    """
    import torch

    spectrum, size = statistics.spectrum(), statistics.size
    used, by = int((spectrum >= tau).sum()) if tau > 0 else 0, "given"
    if tau > 0 and not FREE[0] <= 1 - used / size <= FREE[1]:
        total = spectrum.cumsum(0)
        used = int(torch.searchsorted(total, HELD * total[-1])) + 1
        tau, by = float(spectrum[min(used, len(spectrum)) - 1]), f"{HELD:.0%} of the trace"
    # No eigenvalue is infinite: nothing is protected then.
    least = tau if tau > 0 else math.inf
    free = size - int((spectrum >= least).sum())
    record = {"tau": tau, "tau_by": by, "free_directions": free, "directions": size, "tokens": statistics.tokens}
    return least, record


def largest_lambda(free: float, enough: float = ENOUGH) -> float:
    """Return the largest of 1, 0.1, 0.01, ... with free / (lambda + free) of at least `enough`.

    Args:
        free: k^T P k of the key that has the least of it.
        enough: The share to be written.
    """
    highest = free * (1 - enough) / enough
    return 1.0 if highest >= 1 else 10.0 ** math.floor(math.log10(max(highest, 1e-12)) + 1e-9)


class Writer:
    """Writes names into MLPs of a model in memory, and can take it back.

    Args:
        operation: What the method is given.
        columns: The names.
        free: Layer -> directions that may be used.
        regulariser: lambda; None: chosen per layer.
        earlier: Layer -> keys that are to be left alone [inputs, e].
    """

    def __init__(
        self,
        operation: Operation,
        columns: Sequence[Column],
        free: Mapping[int, Free | KeptFree],
        regulariser: float | None,
        earlier: Mapping[int, torch.Tensor],
    ) -> None:
        self.operation, self.columns, self.free = operation, columns, free
        self.regulariser, self.earlier = regulariser, earlier

    def write(self, targets: Sequence[RoleTensor]) -> Written:
        """Write the names into some layers, in order, each on the model as the ones before have left it.

        Args:
            targets: The last matrix of the MLP of each layer.
        """
        from llmsurgery.edits.kinds import LowRank

        result, last = Written(), layer_of(targets[-1])
        keys, values, wanted = self._look(targets[0], last, first=True)
        assert wanted is not None
        before = (wanted - values).norm(dim=0)
        for number, target in enumerate(targets):
            residuals = (wanted - values) / (len(targets) - number)
            factors, record, shares = self._write_one(target, keys, residuals)
            result.edits.append(LowRank(target.stored, *factors))
            result.keys[layer_of(target)] = keys
            result.weakest = min(result.weakest, *shares)
            following = targets[number + 1] if number + 1 < len(targets) else None
            keys, values, _ = self._look(following, last)
            result.residual = float(((wanted - values).norm(dim=0) / before).mean())
            result.layers.append({**record, "residual": result.residual})
        return result

    def restore(self, targets: Sequence[RoleTensor]) -> None:
        """Put the stored values back."""
        import torch

        from llmsurgery.compute.view import weight_view

        with torch.no_grad():
            for target in targets:
                weight_view(self.operation.model, target).copy_(torch.from_numpy(self.operation.read(target.stored)))

    def _look(
        self, target: RoleTensor | None, block: int, first: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return keys [inputs, names] of a layer, current values [width, names] after a block, and values to write."""
        import torch

        from llmsurgery.compute.spots import Spot, read_spots

        columns, operation = self.columns, self.operation
        groups = [column.keys for column in columns] + [column.values for column in columns]
        contexts = list(dict.fromkeys(context for group in groups for context in group))
        own = len(contexts)
        if first:
            contexts = list(dict.fromkeys((*contexts, *(each for column in columns for each in column.targets))))
        places = {context: number for number, context in enumerate(contexts)}
        seen = read_spots(
            operation.streamed or operation.model,
            operation.structure,
            [Spot(context.encoded.ids, context.last) for context in contexts],
            operation.encoder.pad_id,
            [] if target is None else [target],
            [block],
            # What is looked at again is a batch of its own, so that a streamed model knows it again.
            breaks=(own,),
        )

        def mean(found: torch.Tensor, group: Sequence[Context]) -> torch.Tensor:
            return found[[places[context] for context in group]].double().mean(0).cpu()

        states = seen.states[block]
        values = torch.stack([mean(states, column.values) for column in columns], 1)
        keys = values
        if target is not None:
            keys = torch.stack([mean(seen.keys[layer_of(target)], column.keys) for column in columns], 1)
        if not first:
            return keys, values, None
        wanted = [
            mean(states, column.targets) if column.found is None else column.found(block, values[:, number])
            for number, column in enumerate(columns)
        ]
        return keys, values, torch.stack(wanted, 1)

    def _write_one(
        self, target: RoleTensor, keys: torch.Tensor, residuals: torch.Tensor
    ) -> tuple[tuple[Any, Any], dict[str, object], list[float]]:
        """Write one layer; return the factors as stored, what is said of it, and the share written of each residual."""
        from llmsurgery.compute.associative import oriented, project_out, redirect_factors, update_norm
        from llmsurgery.compute.live import write_low_rank

        layer = layer_of(target)
        free = self.free.get(layer)
        protected, earlier = None if free is None else free.protected, self.earlier.get(layer)
        length = (keys * project_out(keys, protected)).sum(0)
        weight = largest_lambda(float(length.min())) if self.regulariser is None else self.regulariser
        left, right = redirect_factors(keys, residuals, protected, weight, earlier)
        u, v = oriented(left, right, target.transposed)
        stored = self.operation.read(target.stored)
        model = self.operation.streamed or self.operation.model
        added = write_low_rank(model, target, stored, u, v, keys)
        shares = ((added * residuals).sum(0) / residuals.square().sum(0)).tolist()
        record = {
            "layer": layer,
            "lambda": weight,
            "free_key": length.tolist(),
            "strength": shares,
            "norm": update_norm(left, right),
            "earlier_keys": 0 if earlier is None else earlier.shape[1],
            **({} if free is None else free.record),
        }
        return (u.numpy(), v.numpy()), record, shares
