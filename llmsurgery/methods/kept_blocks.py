"""Blocks that a killed run has pruned already, kept where training keeps its states: `--resume` goes on behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.train.state import StateStore


class KeptBlocks:
    """What became of the matrices of each block, on disk.

    Args:
        store: Where states of a run are kept; None keeps nothing.
    """

    def __init__(self, store: StateStore | None) -> None:
        self._store = store

    def load(self, layer: int, targets: Sequence[RoleTensor]) -> dict[str, torch.Tensor] | None:
        """Return what was saved of a block, by stored name; None if nothing was."""
        import torch

        state = None if self._store is None or not targets else self._store.load(layer)
        if state is None:
            return None
        result = {}
        for name, values in state.tensors.items():
            result[name] = values if values.dtype != torch.uint8 else _unpacked(values, int(state.facts[name]))
        return result

    def save(self, layer: int, made: Mapping[str, torch.Tensor]) -> None:
        """Keep what became of the matrices of a block: masks one bit an entry, values in the stored dtype."""
        import torch

        from llmsurgery.train.state import State

        if self._store is None:
            return
        masks = {name: values for name, values in made.items() if values.dtype == torch.bool}
        tensors = {name: _packed(values) if name in masks else values for name, values in made.items()}
        facts = {"step": 1, **{name: mask.shape[1] for name, mask in masks.items()}}
        self._store.save(layer, State(facts, tensors))


def _packed(mask: torch.Tensor) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def _unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns).view(np.bool_))
