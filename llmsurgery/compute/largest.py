"""The k largest of values that come in pieces, without sorting and without holding all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def keep_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions of the largest values, ascending; of equal ones the first count.

    Args:
        values: Values [n].
        count: How many are wanted; all are returned where there are no more.
    """
    if count >= len(values):
        return torch.arange(len(values), device=values.device)
    if count <= 0:
        return torch.empty(0, dtype=torch.long, device=values.device)
    bound = values.topk(count, sorted=False).values.min()
    chosen = values > bound
    equal = (values == bound).nonzero().flatten()[: count - int(chosen.sum())]
    chosen[equal] = True
    return chosen.nonzero().flatten()


@dataclass
class Largest:
    """Collects the largest values of several tensors as if they were one, in the order in which they are added.

    At most 2 `count` values are held.

    Attributes:
        count: How many are kept.
        values: Values held so far [m].
        owners: Number of the tensor of each [m].
        places: Flat index in it of each [m].
    """

    count: int
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    owners: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    places: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def add(self, owner: int, values: torch.Tensor, places: torch.Tensor) -> None:
        """Add the candidates of one tensor.

        Args:
            owner: Number of the tensor.
            values: Their values [n].
            places: Their flat indices, ascending [n].
        """
        kept = keep_largest(values, self.count)
        values, places = values[kept].float().cpu(), places[kept].cpu()
        owners = torch.full((len(values),), owner, dtype=torch.int32)
        self.values = torch.cat([self.values, values])
        self.owners = torch.cat([self.owners, owners])
        self.places = torch.cat([self.places, places])
        kept = keep_largest(self.values, self.count)
        self.values, self.owners, self.places = self.values[kept], self.owners[kept], self.places[kept]

    def of(self, owner: int) -> torch.Tensor:
        """Return the flat indices that were chosen in one tensor, ascending."""
        return self.places[self.owners == owner]

    def __len__(self) -> int:
        return len(self.values)
