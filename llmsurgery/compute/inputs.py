"""Statistics of what enters matrices, caught by hooks: one for each input, however many matrices read it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.compute.lockstep import Ended
from llmsurgery.compute.view import weight_view


class Statistic(Protocol):
    """Something that takes in vectors."""

    def update(self, values: torch.Tensor) -> None:
        """Take in vectors [n, size] of any float dtype; n may be 0."""


S = TypeVar("S", bound=Statistic)


class SquareSum:
    """Sum of squares of each coordinate of a stream of vectors, fp32.

    Args:
        size: Number of coordinates.
        device: Where it lives.

    Attributes:
        count: Vectors seen.
        sum: Sum of squares [size].
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.count = 0
        self.sum = torch.zeros(size, dtype=torch.float32, device=device)

    def update(self, values: torch.Tensor) -> None:
        """Take in vectors [n, size] of any float dtype; n may be 0."""
        self.sum += values.float().square().sum(0)
        self.count += len(values)


def input_width(target: RoleTensor) -> int:
    """Return the number of inputs of a matrix."""
    return target.shape[0] if target.transposed else target.shape[1]


class _Watch(Generic[S]):
    """The statistics of one `with` block."""

    def __init__(self, make: Callable[[int], S]) -> None:
        self._make = make
        self._leader: dict[object, object] = {}
        self._statistics: dict[object, S] = {}
        self._present: list[tuple[torch.Tensor, object]] = []

    def take(self, key: object, values: torch.Tensor) -> None:
        """Take in what enters one matrix, unless that is what entered an earlier one of the same forward."""
        if key not in self._leader:
            shared = [leader for tensor, leader in self._present if tensor is values]
            self._leader[key] = shared[0] if shared else key
        if self._leader[key] != key:
            return
        if any(leader == key for _, leader in self._present):
            # The next forward has begun.
            self._present.clear()
        self._present.append((values, key))
        self.of(key, values.shape[-1]).update(values.reshape(-1, values.shape[-1]))

    def forget(self) -> None:
        """Let go of the tensors of the last forward."""
        self._present.clear()

    def of(self, key: object, size: int) -> S:
        """Return the statistic of a matrix; one that saw nothing has one of its own."""
        leader = self._leader.get(key, key)
        if leader not in self._statistics:
            # A tensor of inference mode could not be changed outside of it.
            with torch.inference_mode(False):
                self._statistics[leader] = self._make(size)
        return self._statistics[leader]


@contextmanager
def watched_inputs(
    model: PreTrainedModel,
    structure: Structure,
    targets: Sequence[RoleTensor],
    make: Callable[[int], S],
    block: torch.nn.Module | None = None,
) -> Iterator[Callable[[RoleTensor], S]]:
    """Take statistics of what enters some matrices in the forwards inside a `with` block.

    Matrices that read one and the same tensor (queries, keys and values; gate and up) share one statistic. An expert
    sees the tokens that are routed to it.

    Args:
        model: The model; the blocks of the matrices are in memory.
        structure: Its roles.
        targets: Matrices.
        make: Makes an empty statistic of vectors of some size.
        block: Raise `Ended` in a forward of this module as soon as all inputs are taken, so that the last matrix does
            not multiply. Never where some matrix saw nothing, or experts are fused.

    Yields:
        A function that returns the statistic of a matrix; it may be called behind the `with` block too.
    """
    watch: _Watch[S] = _Watch(make)
    handles = []
    paths = dict.fromkeys(target.module for target in targets if target.fused is None)
    fused = any(target.fused is not None for target in targets)
    end = None
    if block is not None and not fused:
        end = _End(paths)
        handles.append(block.register_forward_pre_hook(end.begin))
    for path in paths:
        handles.append(model.get_submodule(path).register_forward_pre_hook(_catch(watch, path, end)))
    experts: dict[str, list[RoleTensor]] = defaultdict(list)
    for target in targets:
        if target.fused is not None:
            experts[target.module].append(target)
    for path, members in experts.items():
        module = model.get_submodule(path)
        hook = _catch_experts(watch, model, structure, path, members)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield lambda target: watch.of(_key(target), input_width(target))
    finally:
        watch.forget()
        for handle in handles:
            handle.remove()


def _key(target: RoleTensor) -> object:
    """Return what stands for the input of a matrix."""
    if target.fused is None:
        return target.module
    return target.module, target.expert, "middle" if target.role.endswith(".down") else "entering"


class _End:
    """Ends every forward at the last of some modules."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._all = frozenset(paths)
        self._left: set[str] = set()

    def begin(self, *_: object) -> None:
        """Begin a forward."""
        self._left = set(self._all)

    def reach(self, path: str) -> None:
        """Note that the input of a module is taken."""
        self._left.discard(path)
        if not self._left:
            raise Ended


def _catch(watch: _Watch[Any], path: str, end: _End | None) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        watch.take(path, arguments[0])
        if end is not None:
            end.reach(path)

    return hook


def _catch_experts(
    watch: _Watch[Any], model: PreTrainedModel, structure: Structure, path: str, members: Sequence[RoleTensor]
) -> Callable[..., None]:
    """Return the hook of a module of all experts, which computes again what each of them does inside."""
    numbers = sorted({int(target.expert or 0) for target in members})
    layer = members[0].layer
    down = {target.expert for target in members if target.role.endswith(".down")}
    matrices = {
        (tensor.expert, tensor.role.rpartition(".")[2]): tensor
        for tensor in structure.tensors
        if tensor.module == path and tensor.layer == layer and tensor.part == "weight"
    }

    def hook(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*arguments, **keywords).arguments
        hidden = given["hidden_states"].reshape(-1, given["hidden_states"].shape[-1])
        chosen = given["top_k_index"].reshape(len(hidden), -1)
        activation: Any = module.act_fn
        for number in numbers:
            entering = hidden[(chosen == number).any(-1)]
            watch.take((path, number, "entering"), entering)
            if number in down:
                gate, up = (weight_view(model, matrices[number, name]) for name in ("gate", "up"))
                middle = activation(entering @ gate.mT) * (entering @ up.mT)
                watch.take((path, number, "middle"), middle)

    return hook
