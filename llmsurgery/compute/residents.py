"""Which tensors of a streamed model are in memory, and how others get there and leave again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import STORED, require_finite_values
from llmsurgery.compute.stored import read_stored
from llmsurgery.compute.view import weight_view
from llmsurgery.errors import UnsupportedError


class Residents:
    """Reads stored tensors to where they lie in a model, and takes them out again.

    Args:
        model: The stock model, built without weights.
        checkpoint: Where they are stored.
        structure: Their roles.
        device: Where the model runs.

    Attributes:
        replaced: Stored name -> values in the stored dtype that are read in place of the stored ones.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, structure: Structure, device: torch.device):
        self.replaced: dict[str, torch.Tensor] = {}
        self._model, self._checkpoint, self._structure, self._device = model, checkpoint, structure, device
        self._empty: dict[tuple[str, str], torch.Tensor] = {}
        self._finite: set[str] = set()
        # Memory of dropped tensors, which the next block of the same shapes takes: fresh pages cost as much time as
        # reading does.
        self._spare: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def load_block(self, layer: int, path: str) -> None:
        """Read a block to where it lies in the model.

        Args:
            layer: Its number.
            path: Path of its module.

        Raises:
            UnsupportedError: Not all of its tensors have a role.
        """
        self.load([tensor for tensor in self._structure.tensors if tensor.layer == layer])
        block = self._model.get_submodule(path)
        named = [*block.named_parameters(), *block.named_buffers()]
        if empty := [name for name, tensor in named if tensor.is_meta]:
            raise UnsupportedError(
                f"block {layer} has weights without a role, first {empty[0]}",
                f"the table of the family {self._structure.family.name} does not name them",
                "run the model without streaming",
            )

    def drop(self, layer: int) -> None:
        """Take the tensors of a block out of memory."""
        for tensor in self._structure.tensors:
            if tensor.layer == layer:
                name = tensor.fused.parameter if tensor.fused else tensor.part
                if (empty := self._empty.get((tensor.module, name))) is not None:
                    self._set_aside(tensor, self._model.get_submodule(tensor.module)._parameters.get(name))
                    self._put(tensor.module, name, empty)

    def release(self) -> None:
        """Give the memory of dropped tensors back; the next block takes new memory."""
        self._spare.clear()

    def _set_aside(self, tensor: RoleTensor, values: torch.Tensor | None) -> None:
        """Keep the memory of a tensor that was converted when it was read."""
        converted = values is not None and STORED[tensor.dtype] != values.dtype
        if values is None or values.is_meta or values.device.type != "cpu" or tensor.fused or not converted:
            return
        self._spare.setdefault((values.shape, values.dtype), []).append(values.data)

    def _put(self, path: str, name: str, values: torch.Tensor) -> None:
        module = self._model.get_submodule(path)
        if name in module._parameters:
            whole = isinstance(values, torch.nn.Parameter)
            module._parameters[name] = values if whole else torch.nn.Parameter(values, requires_grad=False)
        else:
            module._buffers[name] = values

    def load(self, tensors: Sequence[RoleTensor]) -> None:
        """Read stored tensors to where they lie in the model."""
        fused: set[tuple[str, str]] = set()
        for tensor in tensors:
            place = (tensor.module, tensor.fused.parameter if tensor.fused else tensor.part)
            empty = self._empty.setdefault(place, getattr(self._model.get_submodule(place[0]), place[1]))
            if tensor.fused is None:
                self._put(*place, self._read(tensor, empty.dtype).to(self._device))
                continue
            if place not in fused:
                self._put(*place, torch.empty(empty.shape, dtype=empty.dtype, device=self._device))
                fused.add(place)
            weight_view(self._model, tensor).copy_(self._read(tensor, empty.dtype))
        shared = [(role, target) for role, target in self._structure.tied.items()]
        for role, target in shared:
            if any(tensor.role == target for tensor in tensors):
                roles = self._structure.family.roles
                source = self._model.get_submodule(roles[target])
                self._model.get_submodule(roles[role])._parameters["weight"] = source._parameters["weight"]

    def _read(self, tensor: RoleTensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a stored tensor on the CPU in a dtype."""
        if (replaced := self.replaced.get(tensor.stored)) is not None:
            return replaced.to(dtype)
        spare = self._spare.get((torch.Size(tensor.shape), dtype))
        values = read_stored(self._checkpoint, tensor.stored, dtype, spare.pop() if spare else None)
        if tensor.stored not in self._finite:
            require_finite_values(tensor.stored, values)
            self._finite.add(tensor.stored)
        return values
