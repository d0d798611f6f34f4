"""What pruning holds in memory beside the model, by phases, for `--dry-run`. No heavy import."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.arch.spec import RoleTensor

if TYPE_CHECKING:
    from llmsurgery.data.windows import Window

WALK_ROWS = 4
"""Windows that go through a block at once unless --batch-size says otherwise."""

READ_TOGETHER = (
    ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_a", "attn.kv_a"),
    ("mlp.gate", "mlp.up", "mlp.gate_up"),
    ("shared.gate", "shared.up"),
    ("expert.gate", "expert.up"),
)
"""Roles whose matrices read one tensor, and share one statistic of it."""

MASK_BYTES = 4 + 4 + 4 + 8 + 2
"""Bytes per entry of a matrix while it is masked: weight, scores, their order with values, marks."""

STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per entry as stored."""

FACTORS = 5
"""Matrices of a second moment's size while it is factorised: itself, damped, its factor, its inverse, the result."""

UPDATED_BYTES = 4 * 4 + 1
"""Bytes per entry of a matrix whose weights make up for others: before, now, scores, errors, marks."""


@dataclass(frozen=True)
class Working:
    """What one phase holds beside the model.

    Attributes:
        phase: Its name.
        windows: Windows whose residual stream is kept from block to block; 0 if the model runs as a whole.
        rows: Windows that run at once; 0 if nothing runs.
        tokens: Tokens of a window.
        held: Bytes of statistics, sums and temporaries, through all of it.
        backward: Whether gradients are computed, one parameter at a time.
    """

    phase: str
    windows: int = 0
    rows: int = 0
    tokens: int = 0
    held: int = 0
    backward: bool = False


def walking(phase: str, windows: Sequence[Window], rows: int | None, held: int) -> Working:
    """Return a walk of windows over the blocks; `rows` run at once, None for the default."""
    return Working(phase, len(windows), min(rows or WALK_ROWS, len(windows)), len(windows[0]), held)


def masking_bytes(targets: Sequence[RoleTensor]) -> int:
    """Return the bytes of masking the largest matrix."""
    return MASK_BYTES * max(target.parameters for target in targets)


def second_moment_bytes(targets: Sequence[RoleTensor]) -> int:
    """Return the bytes of the second moments of the widest block, one of them being factorised, and of its matrix."""
    widths: dict[int, dict[object, int]] = defaultdict(dict)
    for target in targets:
        together = next((group for group in READ_TOGETHER if target.role in group), (target.role,))
        widths[int(target.layer or 0)][together, target.expert] = _inputs(target)
    blocks = max(sum(4 * width**2 for width in block.values()) for block in widths.values())
    factors = 4 * FACTORS * max(_inputs(target) for target in targets) ** 2
    return blocks + factors + UPDATED_BYTES * max(target.parameters for target in targets)


def block_bytes(targets: Sequence[RoleTensor], itemsize: Mapping[str, int]) -> int:
    """Return the bytes of what becomes of the largest block.

    Args:
        targets: The matrices.
        itemsize: Bytes per entry by stored dtype; 1, as of a mask, where it has none.
    """
    sizes: dict[int, int] = defaultdict(int)
    for target in targets:
        sizes[int(target.layer or 0)] += target.parameters * itemsize.get(target.dtype, 1)
    return max(sizes.values())


def _inputs(target: RoleTensor) -> int:
    return target.shape[0] if target.transposed else target.shape[1]
