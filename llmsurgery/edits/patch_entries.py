"""What a patch says of each tensor and side file, and how it is told in the patch's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

FORMAT = 1
MOVED_FORMAT = 2
"""Of patches that change names or shapes."""

KEY = "llmsurgery-patch"
FACTORS_KEY = "llmsurgery-factors"


@dataclass(frozen=True)
class Exact:
    """Entries given in the stored dtype.

    Attributes:
        encoding: "dense", or how the positions are encoded (`llmsurgery.edits.indices`).
        at: Part that holds the positions; None for dense.
        values: Part that holds the values; None sets the positions to zero.
    """

    encoding: str
    at: str | None
    values: str | None


@dataclass(frozen=True)
class TensorPatch:
    """What a patch does to one tensor.

    Attributes:
        name: Stored name.
        dtype: Stored dtype code.
        shape: Stored shape.
        before: SHA-256 of the bytes in the base that it comes from, None if it starts from zeros.
        after: SHA-256 of its bytes in the result.
        factors: (u, v) parts of low-rank terms.
        exact: Entries that are set after the factors.
        source: Name in the base of what it comes from; its own by default, None if it starts from zeros.
        base_shape: Shape of what it comes from; its own by default.
        keep: (axis, part that says which indices of it are kept), for every axis that is cut.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    before: str | None
    after: str
    factors: tuple[tuple[str, str], ...] = ()
    exact: Exact | None = None
    source: str | None = ""
    base_shape: tuple[int, ...] = ()
    keep: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        if self.source == "":
            object.__setattr__(self, "source", self.name)
        if not self.keep:
            object.__setattr__(self, "base_shape", self.shape)

    @property
    def in_place(self) -> bool:
        """Whether name and shape stay."""
        return self.source == self.name and not self.keep

    @property
    def rewritten(self) -> bool:
        """Whether the result has bytes of its own for it."""
        return bool(self.factors or self.exact or self.keep)


@dataclass(frozen=True)
class FilePatch:
    """What a patch does to one side file.

    Attributes:
        path: Relative name.
        before: SHA-256 in the base, None if it is not there.
        after: SHA-256 in the result, None if it is not there.
        content: Part that holds its bytes, None if it is removed.
        mode: Permission bits.
    """

    path: str
    before: str | None
    after: str | None
    content: str | None
    mode: int = 0o644


def encode_metadata(
    config_sha256: str,
    tensors: Mapping[str, TensorPatch],
    files: list[FilePatch],
    provenance: Mapping[str, object],
    key: str = KEY,
    gone: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the container metadata of a patch."""
    moved = bool(gone) or not all(tensor.in_place for tensor in tensors.values())
    document: dict[str, object] = {
        "format": MOVED_FORMAT if moved else FORMAT,
        "base": {"config_sha256": config_sha256},
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "before": tensor.before,
                "after": tensor.after,
                "factors": [list(pair) for pair in tensor.factors],
                "exact": None
                if tensor.exact is None
                else {"encoding": tensor.exact.encoding, "at": tensor.exact.at, "values": tensor.exact.values},
                **({"source": tensor.source} if tensor.source != name else {}),
                **({"base_shape": tensor.base_shape, "keep": dict(tensor.keep)} if tensor.keep else {}),
            }
            for name, tensor in tensors.items()
        },
        "files": [
            {"path": f.path, "before": f.before, "after": f.after, "content": f.content, "mode": f.mode} for f in files
        ],
        "provenance": dict(provenance),
        **({"gone": dict(gone)} if gone else {}),
    }
    return {key: json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)}
