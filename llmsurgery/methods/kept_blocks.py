"""Blocks that a killed run has pruned already, kept where training keeps its states: `--resume` goes on behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.edits.rows import Raw, StoredRows
    from llmsurgery.train.state import StateStore


class KeptBlocks:
    """What became of the matrices of each block, on disk.

    Args:
        store: Where states of a run are kept; None keeps nothing.
        first: What is kept of block 0 has this number among the states; those before it are of other things.
    """

    def __init__(self, store: StateStore | None, first: int = 0) -> None:
        self._store, self._first = store, first

    def load(self, layer: int, targets: Sequence[RoleTensor]) -> dict[str, torch.Tensor] | None:
        """Return what was saved of a block, by stored name; None if nothing was.

        Args:
            layer: Number of the block.
            targets: Its matrices.
        """
        import torch

        state = None if self._store is None or not targets else self._store.load(self._first + layer)
        if state is None:
            return None
        result = {}
        for name, values in state.tensors.items():
            result[name] = values if values.dtype != torch.uint8 else _unpacked(values, int(state.facts[name]))
        return result

    def save(self, layer: int, made: Mapping[str, torch.Tensor]) -> None:
        """Keep what became of the matrices of a block: masks one bit an entry, values as they are.

        Args:
            layer: Number of the block.
            made: Stored name -> mask or values, as stored.
        """
        import torch

        from llmsurgery.train.state import State

        if self._store is None:
            return
        masks = {name: values for name, values in made.items() if values.dtype == torch.bool}
        tensors = {name: _packed(values) if name in masks else values for name, values in made.items()}
        facts = {"step": 1, **{name: mask.shape[1] for name, mask in masks.items()}}
        self._store.save(self._first + layer, State(facts, tensors))

    def rows(self, layer: int, target: RoleTensor, made: torch.Tensor) -> StoredRows | None:
        """Return the kept values of a matrix, read when they are needed; None for a mask, or if nothing is kept.

        Args:
            layer: Number of the block.
            target: The matrix.
            made: What was kept of it.
        """
        import torch

        from llmsurgery.edits.rows import StoredRows

        if self._store is None or made.dtype == torch.bool:
            return None
        read = partial(self._store.rows, self._first + layer, target.stored)

        def raw(start: int, stop: int) -> Raw:
            values = read(start, stop)
            # numpy has no bfloat16: its bits stand for it.
            return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()

        return StoredRows(target.shape, target.dtype, raw)


def _packed(mask: torch.Tensor) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def _unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns).view(np.bool_))
