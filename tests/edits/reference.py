"""What edits make of a checkpoint, computed the plain way: all tensors in memory, one edit after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from llmsurgery.checkpoint import FLOAT, Checkpoint, decode, encode
from llmsurgery.edits.kinds import Add, Drop, LowRank, Mask, Rename, Slice, Sparse, StoredEdit


def expected(base: Checkpoint, edits: Sequence[StoredEdit]) -> dict[str, tuple[str, np.ndarray]]:
    """Return dtype code and stored entries of every tensor of the result; values are rounded once."""
    tensors = {name: (info.dtype, base.read(name)) for name, info in base.tensors.items()}
    values: dict[str, np.ndarray] = {}
    sizes: Counter[str] = Counter()
    for code, raw in tensors.values():
        sizes[code] += raw.size if code in FLOAT else 0
    usual = sizes.most_common(1)[0][0]

    def number(name: str) -> np.ndarray:
        return values.pop(name) if name in values else decode(tensors[name][1], tensors[name][0]).astype(np.float64)

    for edit in edits:
        name = edit.name
        if isinstance(edit, Drop):
            values.pop(name, None)
            del tensors[name]
        elif isinstance(edit, Rename):
            tensors[edit.new] = tensors.pop(name)
            if name in values:
                values[edit.new] = values.pop(name)
        elif isinstance(edit, Add):
            code = edit.dtype or usual
            tensors[name] = (code, encode(edit.values.astype(np.float64), code))
            values[name] = edit.values.astype(np.float64)
        elif isinstance(edit, Slice):
            code, raw = tensors[name]
            tensors[name] = (code, np.take(raw, edit.keep, edit.axis))
            if name in values:
                values[name] = np.take(values[name], edit.keep, edit.axis)
        else:
            old = number(name)
            if isinstance(edit, LowRank):
                new = old + edit.u @ edit.v
            elif isinstance(edit, Mask):
                new = np.where(edit.keep, old, 0)
            elif isinstance(edit, Sparse):
                new = old.copy()
                new.reshape(-1)[edit.indices] = edit.values
            else:
                new = edit.values.astype(np.float64)
            values[name] = new
    return tensors | {name: (tensors[name][0], encode(value, tensors[name][0])) for name, value in values.items()}
