"""How wide a residual stream stays: what stock transformers takes, and which models can be narrowed at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.errors import UnsupportedError, UsageError
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import Structure

GATED = ("mlp.gate", "mlp.gate_up", "expert.gate")
"""A model with one of these has RMSNorm: what has LayerNorm in the supported families has a plain MLP."""

OTHER_NORMS = ("norm.attn_post", "norm.mlp_post", "embed.position")
DEFAULT_SHARE = 0.25


@dataclass(frozen=True)
class WidthConfig:
    """How wide the residual stream stays."""

    sparsity: float | None = option(None, "share of the width that goes, above 0 and below 1; none: 0.25")
    hidden: int | None = option(None, "width that is kept, in place of it; the option --hidden sets it")
    padded: bool = option(
        False, "store a `hidden` that is no multiple of the heads in the next one, with zeros in the channels beyond"
    )
    untie: bool = option(
        False, "give a tied model a head of its own, so that the embedding has an operator too; it is larger for it"
    )


@dataclass(frozen=True)
class Widths:
    """The widths of a run.

    Attributes:
        before: d.
        keep: Channels that stay.
        stored: Width of the result, `keep` or more.
    """

    before: int
    keep: int
    stored: int


def model_width(structure: Structure) -> int:
    """Return the width of the residual stream."""
    return next(tensor.shape[-1] for tensor in structure.tensors if tensor.role == "embed")


def widths_of(config: WidthConfig, structure: Structure) -> Widths:
    """Return the widths of a run.

    Raises:
        UsageError: The share or the width is out of bounds, both are given, or stock transformers takes no such width.
    """
    width, heads = model_width(structure), max(1, structure.heads)
    if config.hidden is None:
        return _shared_widths(config, width, heads)
    if config.sparsity is not None:
        raise UsageError("--hidden and --sparsity are given", "both say how many channels go", "give one of them")
    keep = config.hidden
    if not 0 < keep < width:
        raise UsageError(
            f"a width of {keep} cannot be kept", f"the model has {width}", f"--hidden takes 1 to {width - 1}"
        )
    stored = math.ceil(keep / heads) * heads
    if stored != keep and not config.padded:
        below = f"--hidden {stored - heads} or " if stored > heads else ""
        raise UsageError(
            f"a width of {keep} is no multiple of the {heads} heads",
            "stock transformers refuses such a config.json",
            f"give {below}--hidden {stored}, or --set padded=true to store {keep} channels in {stored}",
        )
    if stored == width:
        raise UsageError(
            f"a width of {keep} takes {stored}, which is what the model has",
            f"the width of the result is a multiple of the {heads} heads",
            f"--hidden {width - heads} is the largest that makes it smaller" if width > heads else "",
        )
    return Widths(width, keep, stored)


def _shared_widths(config: WidthConfig, width: int, heads: int) -> Widths:
    share = DEFAULT_SHARE if config.sparsity is None else config.sparsity
    if not 0 < share < 1:
        raise UsageError(
            f"a sparsity of {share:g} is out of bounds",
            "it is the share of the width that is removed, above 0 and below 1",
            "--sparsity 0.25 keeps three quarters of it; --hidden says the width itself",
        )
    # Multiples of 16 suit matrix products, where that leaves a choice.
    fine = math.lcm(heads, 16)
    unit = fine if width >= 4 * fine else heads
    if unit >= width:
        raise UnsupportedError(
            f"a width of {width} cannot be narrowed", f"it has to stay a multiple of the {heads} heads", ""
        )
    keep = min(max(round((1 - share) * width / unit) * unit, unit), (width - 1) // unit * unit)
    return Widths(width, keep, keep)


def require_narrowable(structure: Structure) -> None:
    """Refuse a model whose norms do not stand before what they feed, or are no RMSNorm.

    Raises:
        UnsupportedError: Names the role.
    """
    present = set(structure.roles)
    if other := [role for role in OTHER_NORMS if role in present]:
        raise UnsupportedError(
            f"the model has {other[0]}",
            "norms behind attention and MLP, and LayerNorm with learned positions, would mix channels behind the gate",
            "use llm-pruner or shortgpt, or a model of Llama's layout",
        )
    if not present & set(GATED):
        raise UnsupportedError(
            f"a {structure.family.name} model is not narrowed",
            "its LayerNorm takes a mean over the channels, which changes with their number",
            "use shortgpt, or a model of Llama's layout",
        )
    rows = {t.role: t.shape[0] for t in structure.tensors if t.role in ("attn.q", "attn.k") and t.part == "weight"}
    for tensor in structure.tensors:
        if tensor.role in ("norm.q", "norm.k") and structure.heads > 1:
            whole = rows.get(f"attn.{tensor.role[-1]}")
            if tensor.shape[0] == whole and whole != rows["attn.q"] // structure.heads:
                raise UnsupportedError(
                    f"{tensor.stored} is a norm over all heads",
                    "stock transformers takes its size from the width, which would no longer be that of the heads",
                    "use shortgpt, or a model of Llama's layout",
                )
