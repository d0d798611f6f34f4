"""A loaded model without some of the rows and columns of its matrices, as the stock class makes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from llmsurgery.errors import SurgeryError

Kept = tuple[int, torch.Tensor]
"""Axis of a parameter, and the indices that stay, in ascending order."""


def smaller_model(model: PreTrainedModel, kept: Mapping[str, Kept], settings: Mapping[str, object]) -> PreTrainedModel:
    """Make a model of another config out of the weights of a loaded one.

    The loaded model gives its weights away: what is cut is freed there tensor by tensor, so that both together never
    take more than it and one tensor; everything else is shared. It is of no use afterwards.

    Args:
        model: A loaded model, or one on the meta device.
        kept: Name of a parameter -> what stays of it; parameters that are not named stay whole.
        settings: Values of the config of its text part that differ.

    Returns:
        The smaller model, in eval mode and without gradients.

    Raises:
        SurgeryError: A tensor does not fit into the smaller model: a bug of the caller.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config.get_text_config(), name, value)
    with torch.device("meta"), no_init_weights():
        small: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    made: dict[int, torch.nn.Parameter] = {}
    for path, module in small.named_modules():
        source = model.get_submodule(path)
        for name, empty in list(module.named_parameters(recurse=False)):
            full, place = source.get_parameter(name), f"{path}.{name}".lstrip(".")
            # Tied parameters stay one.
            if id(full) not in made:
                made[id(full)] = _cut(full, kept.get(place))
            if made[id(full)].shape != empty.shape:
                found, wanted = tuple(made[id(full)].shape), tuple(empty.shape)
                raise SurgeryError(f"{place} is {found}, the smaller model takes {wanted}")
            setattr(module, name, made[id(full)])
        # Frequencies of positions and the like, registered or not.
        for name, value in {**dict(source.named_buffers(recurse=False)), **vars(source)}.items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, value)
    small.eval()
    small.requires_grad_(False)
    return small


def _cut(full: torch.nn.Parameter, kept: Kept | None) -> torch.nn.Parameter:
    """Return what stays of a parameter, and free the whole of it."""
    if kept is None:
        return torch.nn.Parameter(full.data, requires_grad=False)
    axis, indices = kept
    part = full.data.index_select(axis, indices.to(full.device))
    full.data = full.data.new_empty(0)
    return torch.nn.Parameter(part, requires_grad=False)
