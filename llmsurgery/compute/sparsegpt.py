"""SparseGPT on one matrix: zero the weights that cost least, and let the others of their row make up for them.

With H = sum x x^T over the inputs (damped) and U the upper Cholesky factor of H^-1, U^T U = H^-1, column j is paid for
by those to its right: zeroing W_ij costs W_ij^2 / U_jj^2.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from llmsurgery.compute.select import share_of, smallest, smallest_of_all
from llmsurgery.errors import DivergedError

DAMPINGS = 5
"""How often the damping is raised tenfold before a second moment counts as singular."""


@dataclass(frozen=True)
class Factor:
    """What SparseGPT needs of the inputs of a matrix.

    Attributes:
        upper: U [inputs, inputs], fp32.
        dead: Inputs that never fired [inputs], bool.
        damping: Share of the mean diagonal that was added.
    """

    upper: torch.Tensor
    dead: torch.Tensor
    damping: float


def factorise(second: torch.Tensor, damping: float, name: str) -> Factor:
    """Return the upper Cholesky factor of the inverse of a damped second moment.

    Args:
        second: sum x x^T [inputs, inputs], fp32, any scale.
        damping: Share of the mean diagonal that is added; raised tenfold where the factorisation fails.
        name: The matrix, for messages.

    Raises:
        DivergedError: The moment is not finite, or has no inverse under any of the dampings.
    """
    if not bool(torch.isfinite(second).all()):
        raise DivergedError(
            f"the inputs of {name} are NaN or infinite",
            "an activation does not fit into the compute dtype",
            "use --dtype float32 or bfloat16",
        )
    h = second.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    mean = diagonal.mean()
    for _ in range(DAMPINGS + 1):
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not int(wrong):
            inverse = torch.cholesky_inverse(lower)
            upper, wrong = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(wrong) and bool(torch.isfinite(upper).all()):
                return Factor(upper, dead, damping)
        damping = max(10 * damping, 1e-4)
    raise DivergedError(
        f"the second moment of the inputs of {name} is singular",
        f"it has no Cholesky factor even with a damping of {damping / 10:g}",
        "give more or more varied --calibration text, or raise --set damping=...",
    )


def prune_matrix(
    weight: torch.Tensor,
    factor: Factor,
    share: float,
    group: tuple[int, int] | None = None,
    block: int = 128,
    observe: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Prune a matrix and let what stays make up for what goes.

    Args:
        weight: W [outputs, inputs], fp32; it is not changed.
        factor: What `factorise` made of its inputs.
        share: Share of the entries that is zeroed, in each block of columns.
        group: (n, m): zero n of every m consecutive inputs of a row instead.
        block: Columns of a block.
        observe: Called with the first column of each block and the scores W^2 / U_jj^2 [outputs, columns] there, on
            the weights as they stand when the block is reached.

    Returns:
        W with zeros [outputs, inputs], fp32.
    """
    w, u = weight.clone(memory_format=torch.contiguous_format), factor.upper
    w[:, factor.dead] = 0
    width = w.shape[1]
    if group is not None:
        # A group of columns must not be cut by the end of a block.
        block = max(group[1], block - block % group[1])
    for start in range(0, width, block):
        stop = min(start + block, width)
        part, upper = w[:, start:stop], u[start:stop, start:stop]
        squares = upper.diagonal().square()
        if observe is not None:
            observe(start, part.square() / squares)
        if group is None:
            gone = smallest_of_all(part.square() / squares, share_of(share, part.numel()))
        else:
            gone = torch.zeros(part.shape, dtype=torch.bool, device=w.device)
        errors = torch.zeros(part.shape, device=w.device)
        if suits_kernel(part):
            from llmsurgery.compute.sparsegpt_triton import prune_columns

            prune_columns(part, gone, upper, errors, group)
        else:
            _prune_columns(part, gone, upper, errors, group)
        w[:, stop:].addmm_(errors, u[start:stop, stop:], alpha=-1)
    return w


PANEL = 32
"""Columns that pay for each other one by one in the plain loop."""

LARGEST_BLOCK = 256
"""Columns of the widest block whose rows fit into registers."""

OLDEST_CARD = (7, 0)
"""Compute capability that Triton asks for."""


def suits_kernel(part: torch.Tensor) -> bool:
    """Whether the columns of a block [outputs, columns] can be taken by the Triton kernel."""
    on_card = part.device.type == "cuda" and torch.cuda.get_device_capability(part.device) >= OLDEST_CARD
    return on_card and part.shape[1] <= LARGEST_BLOCK and can_compile()


@cache
def can_compile() -> bool:
    """Whether Triton is there, and what it builds the starter of every kernel with: a C compiler, Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    places = {sysconfig.get_config_var("INCLUDEPY"), sysconfig.get_paths("posix_prefix").get("include")}
    headers = any(place and Path(place, "Python.h").is_file() for place in places)
    return find_spec("triton") is not None and compiler is not None and headers


def _prune_columns(
    part: torch.Tensor, gone: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor, group: tuple[int, int] | None
) -> None:
    """Prune the columns of a block in place; arguments as for the Triton kernel.

    A column is one run of memory here, and pays at once only within its panel; the panels behind it are paid by one
    matrix product.
    """
    columns = part.shape[1]
    w, away, lost = part.T.contiguous(), gone.T.contiguous(), torch.zeros_like(part.T)
    squares = upper.diagonal().square()[:, None]
    panel = PANEL if group is None else max(group[1], PANEL - PANEL % group[1])
    for first in range(0, columns, panel):
        last = min(first + panel, columns)
        for j in range(first, last):
            if group is not None and j % group[1] == 0:
                n, m = group
                away[j : j + m] = smallest((w[j : j + m].square() / squares[j : j + m]).T, n).T
            lost[j] = torch.where(away[j], w[j] / upper[j, j], 0.0)
            w[j + 1 : last].addr_(upper[j, j + 1 : last], lost[j], alpha=-1)
            w[j].masked_fill_(away[j], 0)
        w[last:].addmm_(upper[first:last, last:].T, lost[first:last], alpha=-1)
    part.copy_(w.T)
    errors.copy_(lost.T)
