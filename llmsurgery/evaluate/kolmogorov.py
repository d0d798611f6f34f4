"""The two-sample Kolmogorov-Smirnov test with exact integers, however small the p-value (M6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DistributionTest:
    """Outcome of the test.

    Attributes:
        statistic: Largest difference of the two empirical distribution functions.
        p: Two-sided p-value; 0 only where it is below the smallest float.
        log10_p: Its decimal logarithm, finite where p underflows.
    """

    statistic: float
    p: float
    log10_p: float


def two_sample_test(first: Sequence[float], second: Sequence[float]) -> DistributionTest:
    """Test whether two samples come from one distribution.

    Args:
        first: At least one number.
        second: At least one number.

    Returns:
        D, and p = P(D' >= D) over all ways to divide the joint sample.
    """
    n, m = len(first), len(second)
    step = math.gcd(n, m)
    gap = _largest_gap(first, second) // step
    if gap == 0:
        return DistributionTest(0.0, 1.0, 0.0)
    above, total = _equal_sizes(n, gap) if n == m else _unequal_sizes(n, m, gap)
    above = min(above, total)
    return DistributionTest(gap * step / (n * m), above / total, math.log10(above) - math.log10(total))


def _largest_gap(first: Sequence[float], second: Sequence[float]) -> int:
    """Return n m D as an integer: the largest |i m - j n| over i, j = numbers of values up to some point."""
    n, m = len(first), len(second)
    values = sorted([(value, m) for value in first] + [(value, -n) for value in second])
    largest = walk = 0
    for position, (value, weight) in enumerate(values):
        walk += weight
        # Between equal values of the two samples there is no point.
        if position + 1 == len(values) or values[position + 1][0] != value:
            largest = max(largest, abs(walk))
    return largest


def _equal_sizes(n: int, h: int) -> tuple[int, int]:
    """Return numerator and denominator of p = 2 sum_k (-1)^(k-1) C(2n, n - kh) / C(2n, n)."""
    terms = ((-1) ** (k - 1) * math.comb(2 * n, n - k * h) for k in range(1, n // h + 1))
    return 2 * sum(terms), math.comb(2 * n, n)


def _unequal_sizes(n: int, m: int, gap: int) -> tuple[int, int]:
    """Count the lattice paths from (0, 0) to (n, m) that reach |i m - j n| >= gap (both over the common divisor)."""
    step = math.gcd(n, m)
    across, up = m // step, n // step
    inside = [0] * (m + 1)
    for i in range(n + 1):
        # j with |i across - j up| < gap; everything outside is a path that reached the gap.
        low = max(0, (i * across - gap) // up + 1)
        high = min(m, -((-i * across - gap) // up) - 1)
        if i == 0:
            inside[low : high + 1] = [1] * (high + 1 - low)
            continue
        inside[:low] = [0] * low
        for j in range(max(low, 1), high + 1):
            inside[j] += inside[j - 1]
        inside[high + 1 :] = [0] * (m - high)
    total = math.comb(n + m, n)
    return total - inside[m], total
