"""Heads and channels as groups of rows and columns: what they are made of, how many stay, and how they are cut out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.edits.kinds import Slice

HEADS = {"attn.q": 0, "attn.k": 0, "attn.v": 0, "attn.o": 1, "norm.q": 0, "norm.k": 0}
CHANNELS = {"mlp.gate": 0, "mlp.up": 0, "mlp.down": 1}
"""Role -> axis of W [outputs, inputs] that the groups lie along."""

KINDS: Mapping[str, Mapping[str, int]] = {"heads": HEADS, "channels": CHANNELS}
"""Kind of group -> the roles that it cuts."""


@dataclass(frozen=True)
class Counts:
    """How many heads and channels a block has, and how many stay.

    Attributes:
        heads: Query heads.
        groups: Key-value heads, each with its query heads.
        channels: Channels of the MLP.
        kept_groups: Key-value heads that stay.
        kept_channels: Channels that stay.
    """

    heads: int
    groups: int
    channels: int
    kept_groups: int
    kept_channels: int

    @property
    def kept_heads(self) -> int:
        """Query heads that stay."""
        return self.heads // self.groups * self.kept_groups

    @property
    def whole(self) -> dict[str, int]:
        """Kind of group -> number of them."""
        return {"heads": self.groups, "channels": self.channels}

    @property
    def kept(self) -> dict[str, int]:
        """Kind of group -> number of those that stay."""
        return {"heads": self.kept_groups, "channels": self.kept_channels}

    def settings(self, structure: Structure) -> dict[str, int]:
        """Return what config.json says of the result."""
        rows = next(t.shape[0] for t in structure.tensors if t.role == "attn.q" and t.part == "weight")
        return {
            "num_attention_heads": self.kept_heads,
            "num_key_value_heads": self.kept_groups,
            # Else it would be taken to be width / heads.
            "head_dim": rows // self.heads,
            "intermediate_size": self.kept_channels,
        }


def members(structure: Structure, roles: Mapping[str, int]) -> list[RoleTensor]:
    """Return the tensors whose rows or columns are heads or channels, in order of layer."""
    rows = {t.role: t.shape[0] for t in structure.tensors if t.role in ("attn.q", "attn.k") and t.part == "weight"}
    found = []
    for tensor in structure.tensors:
        if tensor.role not in roles or tensor.layer is None:
            continue
        if tensor.role.startswith("norm.") and tensor.shape[0] != rows.get(f"attn.{tensor.role[-1]}"):
            # A norm of one head is shared by all of them.
            continue
        if tensor.part == "bias" and roles[tensor.role] == 1:
            # A bias of outputs that stay.
            continue
        found.append(tensor)
    return sorted(found, key=lambda tensor: tensor.layer or 0)


def groups_kept(groups: int, each: int, width: int, share: float) -> int:
    """Return how many key-value heads stay: of the numbers that are allowed, the nearest to what was asked for.

    Args:
        groups: Key-value heads.
        each: Query heads of one.
        width: Width of the residual stream, which the query heads have to divide.
        share: Share that is to go.
    """
    allowed = [count for count in range(1, groups) if width % (count * each) == 0]
    wanted = (1 - share) * groups
    return min(allowed, key=lambda count: (abs(count - wanted), -count), default=groups)


def channels_kept(channels: int, share: float) -> int:
    """Return how many channels stay: a multiple of 64, or of 8 in small models."""
    unit = 64 if channels >= 512 else 8
    kept = round((1 - share) * channels / unit) * unit
    return max(min(unit, channels), min(kept, channels - unit))


def slices(
    structure: Structure, counts: Counts, keep: Mapping[str, Mapping[int, torch.Tensor]]
) -> list[tuple[RoleTensor, Slice]]:  # fmt: skip
    """Return the tensors that become smaller, each with its slice.

    Args:
        structure: The checkpoint's roles.
        counts: How many groups stay.
        keep: Kind of group -> block -> indices of those that stay, ascending.
    """
    found = []
    for kind, roles in KINDS.items():
        if counts.kept[kind] == counts.whole[kind]:
            continue
        for target in members(structure, roles):
            indices = keep[kind][int(target.layer or 0)]
            found.append((target, _sliced(target, roles[target.role], indices, counts.whole[kind])))
    return found


def _sliced(target: RoleTensor, axis: int, keep: torch.Tensor, groups: int) -> Slice:
    """Return the slice of a tensor that leaves some groups along an axis of W [outputs, inputs]."""
    import torch

    from llmsurgery.edits.kinds import Slice

    stored = 1 - axis if target.transposed and len(target.shape) == 2 else axis
    each = target.shape[stored] // groups
    indices = (keep[:, None].cpu() * each + torch.arange(each)).reshape(-1)
    return Slice(target.stored, stored, indices.numpy())
