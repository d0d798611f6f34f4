"""Training some experts of a parameter that holds all of them.

Handing the whole parameter to the optimizer would move experts that were not chosen: decoupled weight decay acts on
entries without a gradient too. So each chosen matrix gets an fp32 parameter of its own, and the fused values are put
together anew before each forward of the experts' module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor


def attach_experts(
    model: PreTrainedModel, values: Mapping[RoleTensor, torch.Tensor]
) -> dict[RoleTensor, torch.nn.Parameter]:
    """Make matrices of routed experts trainable, each by itself.

    Args:
        model: A loaded model; the fused parameters that hold these matrices cease to be parameters of it.
        values: Tensor of an expert -> its stored values in fp32.

    Returns:
        The trainable fp32 parameter of each tensor.
    """
    groups: dict[tuple[str, str], list[RoleTensor]] = defaultdict(list)
    for target in values:
        assert target.fused is not None
        groups[target.module, target.fused.parameter].append(target)
    masters: dict[RoleTensor, torch.nn.Parameter] = {}
    for (path, name), targets in groups.items():
        module = model.get_submodule(path)
        base = module.get_parameter(name).detach()
        own = {target: torch.nn.Parameter(values[target].to(base.device)) for target in targets}
        _assemble_before_forward(module, name, base, own)
        masters.update(own)
    return masters


def _assemble_before_forward(
    module: torch.nn.Module, name: str, base: torch.Tensor, masters: Mapping[RoleTensor, torch.nn.Parameter]
) -> None:
    """Replace a fused parameter [experts, rows, columns] by one that is made of `base` and the masters."""
    delattr(module, name)

    def assemble(_module: torch.nn.Module, _inputs: tuple[object, ...]) -> None:
        matrices = list(base.unbind(0))
        for target, master in masters.items():
            assert target.fused is not None
            assert target.expert is not None
            blocks = list(matrices[target.expert].chunk(target.fused.blocks))
            blocks[target.fused.block] = master.to(base.dtype)
            matrices[target.expert] = torch.cat(blocks)
        # Stacking rather than writing into a copy: the backward then hands each master its slice of the gradient.
        setattr(module, name, torch.stack(matrices))

    assemble(module, ())
    module.register_forward_pre_hook(assemble)
