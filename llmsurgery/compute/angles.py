"""Directions of concepts, and rows turned away from them (TARS, arXiv 2412.10257)."""

from __future__ import annotations

import torch

MODES = ("reverse", "zero", "project")


def cosines(rows: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return cos(w, v) of rows [rows, width] with a direction [width], fp64; 0 for a row of zeros."""
    rows, v = rows.double(), v.double()
    norms = rows.norm(dim=1)
    return torch.where(norms > 0, rows @ v / v.norm() / norms.clamp(min=1e-300), 0.0)


def changed_row(row: torch.Tensor, v: torch.Tensor, mode: str) -> torch.Tensor:
    """Return what becomes of a row [width], fp64.

    Args:
        row: w [width].
        v: Direction of the concept [width].
        mode: "reverse" for -|w| v / |v|, "zero" for 0, "project" for w - (w.v) v / |v|^2.
    """
    row, v = row.double(), v.double()
    if mode == "zero":
        return torch.zeros_like(row)
    along: torch.Tensor = row.norm() / v.norm() if mode == "reverse" else (row @ v) / (v @ v)
    return -along * v if mode == "reverse" else row - along * v


def refine_by_head(v: torch.Tensor, head: torch.Tensor, token: int, p_stop: float) -> tuple[torch.Tensor, float]:
    """Return v + a (W[t] - mean row) and a, the smallest that makes the token's probability p_stop.

    Args:
        v: Direction [width].
        head: W [vocabulary, width].
        token: t.
        p_stop: Probability that is enough. Where no a reaches it, that with the largest probability is taken.
    """
    step = head[token] - head.mean(0)
    base, slope = head @ v, head @ step

    def chance(a: float) -> float:
        return float((base + a * slope).softmax(0)[token])

    if chance(0.0) >= p_stop:
        return v, 0.0
    tried = [2.0**power for power in range(-6, 21)]
    high = next((a for a in tried if chance(a) >= p_stop), None)
    if high is None:
        best = max([0.0, *tried], key=chance)
        return v + best * step, best
    low = 0.0 if high == tried[0] else high / 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= p_stop else (middle, high)
    return v + high * step, high


def refine_by_noise(
    v: torch.Tensor, head: torch.Tensor, token: int, p_stop: float, sigma: float, steps: int, seed: int
) -> tuple[torch.Tensor, int]:
    """Return v after steps sigma |v| / sqrt(width) eps that made the token likelier, and how many were taken.

    Args:
        v: Direction [width].
        head: W [vocabulary, width].
        token: t.
        p_stop: Probability that is enough.
        sigma: Length of a step, in lengths of v.
        steps: Steps that are tried at most.
        seed: Seed of eps ~ N(0, I).
    """
    draw = torch.Generator().manual_seed(seed)
    best, taken = float((head @ v).softmax(0)[token]), 0
    for _ in range(steps):
        if best >= p_stop:
            break
        noise = torch.randn(v.shape, generator=draw).to(v)
        candidate = v + sigma * v.norm() / len(v) ** 0.5 * noise
        chance = float((head @ candidate).softmax(0)[token])
        if chance > best:
            v, best, taken = candidate, chance, taken + 1
    return v, taken
