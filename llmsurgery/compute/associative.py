"""A linear map as an associative memory: low-rank updates that write values at keys and little elsewhere.

W turns a key k into the value W k. Everything here returns a pair (left, right) with Delta = left @ right for a matrix
[outputs, inputs]; for one that is stored [inputs, outputs] it is (right^T, left^T). All of it is one formula, with S a
symmetric matrix that says where keys of ordinary text do not lie:

    Delta = R (weight I + K^T S K)^-1 (S K)^T

    S = C^-1, weight 0           ROME, arXiv 2202.05262: W' K = V exactly, sum_n |Delta k_n|^2 minimal
    S = C^-1, weight lambda      MEMIT, arXiv 2210.07229: equal to R K^T (lambda C + K K^T)^-1 by Woodbury's identity
    S = I - V V^T, weight lambda  null space, arXiv 2410.02355 and 2506.07795: keys in the span of V do not notice

C = E[k k^T] is the second moment of keys of ordinary text, R the residuals V - W K. All products are float64, and only
systems as large as the number of keys are solved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmsurgery.errors import InputError

Factors = tuple[torch.Tensor, torch.Tensor]
"""Left [outputs, rank] and right [rank, inputs] of an update, float64."""

Solve = Callable[[torch.Tensor], torch.Tensor]
"""Returns S X for X [inputs, n], in float64."""

BLOCK_ENTRIES = 2**22
"""Entries of a matrix that are widened to float64 at once."""

_DIRECTIONS = 512
"""Protected directions that are widened to float64 at once."""

EXACT = 1e-6
"""How far the share of a residual that is written may be from 1 where all of it is to be written."""


def insert_factors(
    keys: torch.Tensor,
    residuals: torch.Tensor,
    second: torch.Tensor | Solve,
    weight: float | None,
    read: torch.Tensor | None = None,
) -> Factors:
    """Return the update that adds residuals at keys and disturbs other keys least.

    Args:
        keys: K [inputs, c].
        residuals: R = V - W K, what is to be added at each key [outputs, c].
        second: C [inputs, inputs], positive definite, or a function that returns C^-1 X.
        weight: lambda, how many tokens of ordinary text the second moment is worth (MEMIT); None: the residuals are
            written exactly (ROME).
        read: Keys at which the residuals are written, if not K itself [inputs, c]: the released code of ROME takes the
            direction from the mean key and divides by the bare prompt's.

    Returns:
        Left [outputs, c] and right [c, inputs].

    Raises:
        InputError: C is not positive definite, or keys depend on one another and `weight` is None or 0.
    """
    if isinstance(second, torch.Tensor):
        second = moment_solve(second)
    keys = keys.double()
    solved = second(keys).to(keys)
    return residuals.double(), _inner(solved, keys if read is None else read.double(), weight or 0.0)


def redirect_factors(
    keys: torch.Tensor,
    residuals: torch.Tensor,
    protected: torch.Tensor | None,
    regulariser: float,
    earlier: torch.Tensor | None = None,
) -> Factors:
    """Return the update that adds residuals at keys and leaves protected directions and earlier keys alone.

    Args:
        keys: K [inputs, c].
        residuals: R, what is to be added at each key [outputs, c].
        protected: V, orthonormal columns [inputs, b] that the update must not answer to; None: none.
        regulariser: lambda. For one key, the share k^T P k / (lambda + k^T P k) of its residual is written.
        earlier: Keys of edits made before [inputs, e]; they are given zero residuals.

    Returns:
        Left [outputs, c] and right [c, inputs]: Delta = R (lambda I + K^T P K)^-1 K^T P, earlier keys being further
        columns of K.

    Raises:
        InputError: Keys depend on one another and `regulariser` is 0, or nothing is left of a key.
    """
    own = keys.shape[1]
    every = keys.double() if earlier is None else torch.cat([keys.double(), earlier.to(keys).double()], 1)
    projected = project_out(every, protected)
    # With a projector K^T P K = (P K)^T (P K), which is symmetric to the last bit.
    return residuals.double(), _inner(projected, projected, regulariser)[:own]


def project_out(vectors: torch.Tensor, protected: torch.Tensor | None) -> torch.Tensor:
    """Return P x = x - V (V^T x) of the columns of [inputs, n], float64.

    The inputs x inputs projector is never made: for 14,336 inputs it takes 822 MB in fp32.
    """
    vectors = vectors.double()
    if protected is None or not protected.shape[1]:
        return vectors
    left = vectors.clone()
    # Orthonormal directions can be taken out one after the other, and need not all be widened at once.
    for basis in torch.split(protected, _DIRECTIONS, 1):
        wide = basis.to(vectors)
        left -= wide @ (wide.T @ vectors)
    return left


def moment_solve(second: torch.Tensor, ridge: float = 0.0) -> Solve:
    """Return X -> (C + ridge * mean(diag C) I)^-1 X, by one Cholesky factorisation.

    Args:
        second: C [inputs, inputs], any float dtype.
        ridge: Share of the mean diagonal that is added.

    Raises:
        InputError: The matrix is not positive definite.
    """
    c = second.double()
    c = (c + c.T) / 2
    c.diagonal().add_(ridge * c.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(c)
    if int(failed):
        raise InputError(
            "the second moment of the keys cannot be inverted",
            "ordinary text never reaches some direction of the keys",
            "take more text, or a ridge",
        )

    def solve(right: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.cholesky_solve(right.to(factor), factor)
        return result

    return solve


def _inner(solved: torch.Tensor, read: torch.Tensor, weight: float) -> torch.Tensor:
    """Return (weight I + (S K)^T read)^-1 (S K)^T [c, inputs].

    Raises:
        InputError: The system has no solution.
    """
    system = solved.T @ read
    system.diagonal().add_(weight)
    right, failed = torch.linalg.solve_ex(system, solved.T)
    unit = torch.eye(len(system)).to(system)
    # Two equal keys leave a pivot of rounding size: only what is written shows it.
    if int(failed) or (weight == 0 and not bool(((right @ read - unit).abs() < EXACT).all())):
        raise InputError(
            "the residuals cannot be written at these keys",
            "two keys are the same, or nothing is left of one outside the protected directions",
            "leave out repeated subjects, or raise the regulariser",
        )
    result: torch.Tensor = right
    return result


def apply_matrix(stored: torch.Tensor, keys: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return W K [outputs, c], float64, a few rows at a time.

    Args:
        stored: W as stored, [outputs, inputs] or with `transposed` [inputs, outputs].
        keys: K [inputs, c].
        transposed: Whether it is stored the other way round.
    """
    keys = keys.double()
    rows = max(1, BLOCK_ENTRIES // stored.shape[1])
    if not transposed:
        return torch.cat([part.double() @ keys for part in torch.split(stored, rows)])
    result = keys.new_zeros(stored.shape[1], keys.shape[1])
    for part, inputs in zip(torch.split(stored, rows), torch.split(keys, rows), strict=True):
        result += part.double().T @ inputs
    return result


def written_share(right: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return which share of its own residual each key receives [c]: the diagonal of right @ K.

    Args:
        right: Right factor [c, inputs].
        keys: K [inputs, c].
    """
    shares: torch.Tensor = torch.linalg.vecdot(right, keys.to(right).T)
    return shares


def update_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the Frobenius norm of left @ right without making the product."""
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def oriented(left: torch.Tensor, right: torch.Tensor, transposed: bool) -> Factors:
    """Return the factors of an update in the orientation of the stored matrix."""
    return (right.T, left.T) if transposed else (left, right)
