"""When the norms of a model are switched off: the order of the paper, its numbers by size, and the events they give.

With n blocks, start a and gaps g_mlp, g_qk, g_v (steps):

    norm before the MLP of block i                     a + i g_mlp
    norm before attention of block i, for q and k      a + n g_mlp + i g_qk
    the same norm, for v                               a + n (g_mlp + g_qk) + i g_v
    last norm                                          a + n (g_mlp + g_qk + g_v)

With special_first=position the end token's own sigma goes next, block by block, from 2 steps later on, and the first
position's 10 steps after that. A pace other than 1 multiplies all of it, rounded down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

END_AFTER, FIRST_AFTER = 2, 10


@dataclass(frozen=True)
class Event:
    """One switch.

    Attributes:
        step: Optimizer steps before it.
        kind: "mlp", "qk", "v", "final", "end" (end tokens lose their sigma) or "first" (the first position does).
        layer: Block, None for the last norm and the first position.
    """

    step: int
    kind: str
    layer: int | None = None


@dataclass(frozen=True)
class Size:
    """The paper's numbers for one size of model.

    Attributes:
        blocks: Models up to that many blocks.
        start: Steps before the first switch.
        gap_mlp: Steps between the norms before MLPs.
        gap_qk: Steps between the norms before attention, for queries and keys.
        gap_v: The same for values.
        max_steps: Steps in all.
        lr: Step size after the warm-up.
        lr_end: Share of it that the cosine ends at.
        warmup_steps: Steps of warm-up.
        aux: Weight of the auxiliary loss.
        momentum: Share of the old sigma at every step.
        batch_size: Rows of 1024 tokens per step.
    """

    blocks: int
    start: int
    gap_mlp: int
    gap_qk: int
    gap_v: int
    max_steps: int
    lr: float
    lr_end: float
    warmup_steps: int
    aux: float
    momentum: float
    batch_size: int


SIZES = {
    "small": Size(12, 20, 2, 2, 3, 300, 6e-4, 0.5, 20, 0.1, 0.9, 480),
    "medium": Size(24, 20, 2, 2, 3, 500, 6e-4, 0.5, 10, 0.1, 0.9, 506),
    "large": Size(36, 30, 4, 4, 6, 600, 3e-4, 2 / 15, 15, 0.03, 0.9119, 504),
    "xl": Size(48, 50, 4, 4, 6, 800, 1e-4, 0.2, 20, 0.01, 0.9425, 504),
}
"""GPT-2 by size, as released with the paper."""


def size_for(blocks: int) -> Size:
    """Return the numbers for a model of so many blocks: those of the next larger GPT-2, or of the largest."""
    return next((size for size in SIZES.values() if blocks <= size.blocks), SIZES["xl"])


def preset_of(size: Size) -> dict[str, object]:
    """Return a size as a preset of hyperparameters."""
    values = dataclasses.asdict(size)
    del values["blocks"]
    return {**values, "pace": 1.0, "window": 1024}


def events_of(blocks: int, start: int, gaps: Sequence[int], special: bool = False, pace: float = 1.0) -> list[Event]:
    """Return the switches in order: 3 per block and one for the last norm, and those of special positions.

    Args:
        blocks: Number of blocks n.
        start: Steps before the first.
        gaps: Gaps of the norms before MLPs, of queries and keys, of values.
        special: Whether the first position and end tokens have a sigma of their own.
        pace: Factor of all steps.
    """
    events, at = [], start
    for kind, gap in zip(("mlp", "qk", "v"), gaps, strict=True):
        events += [Event(at + layer * gap, kind, layer) for layer in range(blocks)]
        at += blocks * gap
    events.append(Event(at, "final"))
    if special:
        events += [Event(at + END_AFTER + layer, "end", layer) for layer in range(blocks)]
        events.append(Event(at + END_AFTER + blocks - 1 + FIRST_AFTER, "first"))
    # A hair more than the product: 0.1 * 30 is 3 and not 2.
    return [dataclasses.replace(event, step=int(pace * event.step + 1e-9)) for event in events]
