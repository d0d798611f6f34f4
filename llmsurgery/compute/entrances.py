"""What enters some blocks, kept per batch, so that a later forward of the same batch need not begin at the first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


class Entrances:
    """Residual streams at the entrance of marked blocks, by the batch that they belong to.

    Attributes:
        marks: Numbers of the blocks.
    """

    def __init__(self) -> None:
        self.marks: set[int] = set()
        self._kept: dict[bytes, dict[int, torch.Tensor]] = {}

    def find(self, batch: bytes, since: int) -> tuple[int, torch.Tensor] | None:
        """Return the last block up to `since` whose entrance is known, and what enters it; None if none is."""
        places = [place for place in self._kept.get(batch, ()) if place <= since]
        # A copy: what is kept must not change if a block works in place.
        return (max(places), self._kept[batch][max(places)].clone()) if places else None

    def keep(self, batch: bytes, place: int, entering: torch.Tensor) -> None:
        """Keep what enters a block, if the block is marked."""
        if place in self.marks:
            self._kept.setdefault(batch, {})[place] = entering.clone()

    def forget_behind(self, layer: int) -> None:
        """Forget what enters the blocks behind one that has changed."""
        for places in self._kept.values():
            for place in [place for place in places if place > layer]:
                del places[place]


def batch_digest(arguments: Iterable[Any], keywords: Mapping[str, Any]) -> bytes:
    """Return a digest of what the first block is given: two batches with the same one are the same.

    Args:
        arguments: Positional arguments of the block.
        keywords: Its keyword arguments.
    """
    digest = hashlib.sha256()
    for tensor in _tensors([*arguments, *(keywords[name] for name in sorted(keywords))]):
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors([values[name] for name in sorted(values)])
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
