"""The columns of one block of SparseGPT as a Triton kernel: the weights of a row never leave the registers.

Column by column, plain PyTorch launches half a dozen small kernels for each, and a GPU waits for nearly all of that
time. Rows know nothing of each other, so one program takes some rows through all columns of a block. Imported only
where Triton is installed; `benchmarks/gpu.py` measures it against the plain loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16
"""Rows of one program."""


def prune_columns(
    part: torch.Tensor, gone: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor, group: tuple[int, int] | None
) -> None:
    """Prune the columns of a block in place, each paid for by those to its right.

    Args:
        part: Weights [outputs, columns], fp32, neighbours in a row side by side.
        gone: What is zeroed [outputs, columns], bool; unused with a group, whose zeros are chosen here.
        upper: That block of the Cholesky factor [columns, columns], fp32.
        errors: Is given what each column lost, divided by the factor's diagonal [outputs, columns], fp32.
        group: (n, m): zero n of every m consecutive columns of a row; m divides the columns.
    """
    rows, columns = part.shape
    upper = upper.contiguous()
    n, m = group or (0, 0)
    # Triton starts on the current card, whichever the tensors are on.
    with torch.cuda.device(part.device):
        _columns[(triton.cdiv(rows, ROWS),)](
            part,
            gone.view(torch.uint8),
            upper,
            errors,
            rows,
            columns,
            part.stride(0),
            gone.stride(0),
            upper.stride(0),
            errors.stride(0),
            N=n,
            M=m,
            ROWS=ROWS,
            COLUMNS=triton.next_power_of_2(columns),
        )


@triton.jit
def _columns(  # type: ignore[no-untyped-def]
    part,
    gone,
    upper,
    errors,
    rows,
    columns,
    part_stride,
    gone_stride,
    upper_stride,
    errors_stride,
    N: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Take `ROWS` rows through all columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)
    inside = (row < rows) & (column < columns)[None, :]
    w = tl.load(part + row * part_stride + column[None, :], mask=inside, other=0.0)
    zero = tl.load(gone + row * gone_stride + column[None, :], mask=inside, other=0).to(tl.int32)
    diagonal = tl.load(upper + column * (upper_stride + 1), mask=column < columns, other=1.0)
    squares = (diagonal * diagonal)[None, :]
    lost = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(columns):
        here = (column == j)[None, :]
        if M > 0 and j % M == 0:
            scores = w * w / squares
            rank = tl.zeros([ROWS, COLUMNS], tl.int32)
            for other in range(M):
                # Among equals the first by index goes, as everywhere.
                score = tl.sum(tl.where((column == j + other)[None, :], scores, 0.0), axis=1)[:, None]
                before = (score < scores) | ((score == scores) & (j + other < column)[None, :])
                rank += before.to(tl.int32)
            chosen = ((column >= j) & (column < j + M))[None, :]
            zero = tl.where(chosen, (rank < N).to(tl.int32), zero)
        value = tl.sum(tl.where(here, w, 0.0), axis=1)
        away = tl.sum(tl.where(here, zero, 0), axis=1) != 0
        factor = tl.load(upper + j * upper_stride + column, mask=(column >= j) & (column < columns), other=0.0)
        error = tl.where(away, value / tl.load(upper + j * (upper_stride + 1)), 0.0)
        w = w - error[:, None] * factor[None, :]
        # Rounding must not leave a little of what was zeroed.
        w = tl.where(here & away[:, None], 0.0, w)
        lost = tl.where(here, error[:, None], lost)
    tl.store(part + row * part_stride + column[None, :], w, mask=inside)
    tl.store(errors + row * errors_stride + column[None, :], lost, mask=inside)
