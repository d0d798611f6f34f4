"""Second moments of MLP keys: which directions ordinary text uses, and systems of equations with them.

The key of a token in a block is the input of the block's last MLP matrix, k [size]. Over ordinary text, padding left
out and the mean not taken off,

    C = E[k k^T] = K^T K / n,    K [n, size] the keys of n tokens.

With fewer tokens than dimensions the keys themselves are kept instead of C. C = K^T K / n and G = K K^T / n have the
same eigenvalues but for zeros, and G is the smaller matrix; what no key reaches is the null space, exactly. No
size x size matrix is formed then, let alone decomposed: with m = size, n tokens cost n^2 m instead of m^3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from llmsurgery.errors import SurgeryError, UsageError

ENOUGH = 5
"""Tokens per dimension below which directions that were merely not seen pass for unused ones."""

_ROWS = 2048
"""Keys that are widened at once."""


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moment of the inputs of one block's mlp.down over ordinary text.

    Attributes:
        layer: Block number.
        size: Number of coordinates of a key.
        tokens: Number of keys that were seen.
        keys: The keys [tokens, size] in the compute dtype, if there are fewer of them than coordinates, else None.
        second: E[k k^T] [size, size], fp32, if there are more, else None.
    """

    layer: int
    size: int
    tokens: int
    keys: torch.Tensor | None = None
    second: torch.Tensor | None = None

    @classmethod
    def of_keys(cls, layer: int, keys: torch.Tensor) -> KeyStatistics:
        """Return the statistics of keys [tokens, size]."""
        tokens, size = keys.shape
        if tokens < size:
            return cls(layer, size, tokens, keys=keys)
        second = torch.zeros(size, size, device=keys.device)
        for part in torch.split(keys, _ROWS):
            second.addmm_(part.float().mT, part.float())
        return cls(layer, size, tokens, second=second.div_(tokens))

    @property
    def enough(self) -> bool:
        """Whether there are at least five tokens per dimension."""
        return self.tokens >= ENOUGH * self.size

    def merge(self, other: KeyStatistics) -> KeyStatistics:
        """Return the statistics of both streams of keys together.

        Raises:
            SurgeryError: They are of different layers or sizes.
        """
        if (self.layer, self.size) != (other.layer, other.size):
            raise SurgeryError(f"statistics of layers {self.layer} and {other.layer} cannot be merged")
        if self.keys is not None and other.keys is not None:
            return KeyStatistics.of_keys(self.layer, torch.cat((self.keys, other.keys)))
        total = self.tokens + other.tokens
        second = self.moment() * (self.tokens / total) + other.moment() * (other.tokens / total)
        return KeyStatistics(self.layer, self.size, total, second=second)

    def moment(self) -> torch.Tensor:
        """Return C [size, size], fp32."""
        if self.second is not None:
            return self.second
        keys = self._rows()
        return (keys.mT @ keys).div_(self.tokens).float()

    def _rows(self) -> torch.Tensor:
        """Return the keys [tokens, size], float64."""
        assert self.keys is not None
        return self.keys.double()

    @cached_property
    def _gram(self) -> torch.Tensor:
        """K K^T [tokens, tokens], float64."""
        rows = self._rows()
        return rows @ rows.mT

    @cached_property
    def mean_square(self) -> float:
        """Mean of the diagonal of C: the mean square of a coordinate."""
        if self.second is not None:
            return float(self.second.diagonal().double().mean())
        return float(self._gram.diagonal().sum()) / (self.tokens * self.size)

    @cached_property
    def _decomposition(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues of C that are not zero, descending, and their eigenvectors as columns: of C, or of K K^T."""
        matrix = self._gram / self.tokens if self.second is None else self.second.double()
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0), vectors.flip(1)
        # C was summed in fp32, and nothing below its rounding is known; the Gram matrix is summed in float64.
        wide, single = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
        rank = int((values > values[0] * (self.size * wide if self.second is None else single)).sum())
        return values[:rank], vectors[:, :rank]

    def spectrum(self) -> torch.Tensor:
        """Return the eigenvalues of C that are not zero, descending, float64."""
        return self._decomposition[0]

    def protected(self, tau: float) -> torch.Tensor:
        """Return the directions that ordinary text uses.

        Args:
            tau: Smallest eigenvalue of C, a mean square, that counts as used.

        Returns:
            V [size, b], float64, orthonormal columns: the eigenvectors of C whose eigenvalue is not zero and at least
            tau. P k = k - V (V^T k) takes them out of a vector.
        """
        values, vectors = self._decomposition
        count = int((values >= tau).sum())
        vectors = vectors[:, :count]
        if self.second is not None:
            return vectors
        # C K^T u = K^T G u: a right singular vector of K, as long as the square root of its eigenvalue.
        basis = (self._rows().mT @ vectors) / (values[:count] * self.tokens).sqrt()
        # Small eigenvalues lose digits to the rounding of the large ones; the span is right, the angles are mended.
        orthonormal: torch.Tensor = torch.linalg.qr(basis).Q
        return orthonormal

    def solve(self, right: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return (C + ridge * mean(diag C) * I)^-1 right.

        By Cholesky; with fewer tokens than dimensions by Woodbury's identity on K K^T.

        Args:
            right: One or more vectors [size] or [size, columns].
            ridge: Share of the mean diagonal that is added.

        Returns:
            The solution, shaped as `right`, float64.

        Raises:
            UsageError: The matrix is singular.
        """
        device = (self.second if self.keys is None else self.keys).device  # type: ignore[union-attr]
        columns = right.to(device, torch.float64)
        columns = columns[:, None] if right.dim() == 1 else columns
        damping = ridge * self.mean_square
        if self.second is not None:
            matrix = self.second.double()
        else:
            # (damping I + K^T K / n)^-1 = (I - K^T (n damping I + K K^T)^-1 K) / damping
            matrix = self._gram.clone()
            if damping <= 0:
                raise self._singular(ridge)
        matrix.diagonal().add_(damping * (1 if self.second is not None else self.tokens))
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise self._singular(ridge)
        if self.second is not None:
            solved = torch.cholesky_solve(columns, factor)
        else:
            rows = self._rows()
            solved = (columns - rows.mT @ torch.cholesky_solve(rows @ columns, factor)) / damping
        return solved[:, 0] if right.dim() == 1 else solved

    def _singular(self, ridge: float) -> UsageError:
        return UsageError(
            f"the second moment of layer {self.layer} has no inverse with a ridge of {ridge:g}",
            f"{self.tokens} tokens do not fill the {self.size} dimensions of a key",
            "raise the ridge, or take more tokens",
        )
