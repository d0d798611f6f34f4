"""Keys of names that were redirected before: kept beside a result, so that a later redirection leaves them alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAME = "redirect-keys.safetensors"


def read_keys(folder: Path | None) -> dict[int, torch.Tensor]:
    """Return the kept keys of each layer [inputs, names], fp32; none if nothing was kept.

    Args:
        folder: What stands beside the source.

    Raises:
        DamagedError: The file is there but cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from llmsurgery.errors import DamagedError

    path = None if folder is None else folder / NAME
    if path is None or not path.is_file():
        return {}
    try:
        return {int(name.removeprefix("layer.")): keys for name, keys in load(path.read_bytes()).items()}
    except (SafetensorError, ValueError) as error:
        raise DamagedError(
            f"the keys of earlier redirections in {path} cannot be read", str(error), "remove the file to go without"
        ) from error


def keys_file(earlier: Mapping[int, torch.Tensor], new: Mapping[int, torch.Tensor]) -> dict[str, bytes]:
    """Return the file that keeps earlier and new keys, by its name.

    Args:
        earlier: Layer -> kept keys [inputs, names].
        new: Layer -> keys of this operation [inputs, names].
    """
    import torch
    from safetensors.torch import save

    layers = sorted({*earlier, *new})
    parts = {layer: [group[layer].float() for group in (earlier, new) if layer in group] for layer in layers}
    return {NAME: save({f"layer.{layer}": torch.cat(keys, 1).contiguous() for layer, keys in parts.items()})}
