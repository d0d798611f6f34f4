"""The checkpoint that is edited: the dtype and the tensors that it stores, and what an edit asks of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmsurgery.arch.spec import RoleTensor, Structure, require_text_model
from llmsurgery.checkpoint import FLOAT, Checkpoint, decode, require_finite
from llmsurgery.errors import UnsupportedError
from llmsurgery.methods.base import Method

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype code that most parameters are stored in."""
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        counts[info.dtype] += info.size
    return counts.most_common(1)[0][0]


def check_pictures(method: Method, structure: Structure) -> None:
    """Refuse a model that sees pictures, of a method that is for text models.

    Raises:
        UnsupportedError: It is one.
    """
    if not method.spec.pictures:
        require_text_model(structure, method.spec.name)


def check_editable(targets: Sequence[RoleTensor]) -> None:
    """Refuse tensors whose stored dtype cannot be edited.

    Raises:
        UnsupportedError: Names the first.
    """
    if other := [target for target in targets if target.dtype not in FLOAT]:
        raise UnsupportedError(
            f"tensor {other[0].stored} is stored as {other[0].dtype}",
            f"only {', '.join(sorted(FLOAT))} weights can be edited",
            "",
        )


def tensor_reader(checkpoint: Checkpoint) -> Callable[[str], npt.NDArray[np.floating]]:
    """Return a function that reads a stored tensor as float32 and refuses NaN and Inf."""

    def read(name: str) -> npt.NDArray[np.floating]:
        info, raw = checkpoint.info(name), checkpoint.read(name)
        require_finite(raw, info.dtype, name)
        return decode(raw, info.dtype)

    return read
