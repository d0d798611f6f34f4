"""Batches that go through a model one block at a time, so that each block can be looked at, changed and run again.

The first blocks' inputs, and everything else that a block is called with (masks, position embeddings, which differ
from layer to layer in some families), are caught from the stock model: stand-ins take the place of its blocks and note
the call. No architecture has code of its own here. Of a streamed model one block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.blocks import blocks_path
from llmsurgery.compute.head import backbone
from llmsurgery.compute.lockstep import Ended
from llmsurgery.compute.residual import first_tensor
from llmsurgery.compute.stream import StreamedModel, in_memory

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside the residual stream."""


class BlockWalk:
    """Some batches on their way through a model.

    Args:
        model: A causal language model in eval mode, loaded or streamed.
        structure: Its roles.
        batches: Token ids [rows, time], none of them padding; all batches have the same length.

    Attributes:
        states: Residual stream of each batch before the next block [rows, time, width].
        layer: Number of the next block.
    """

    def __init__(
        self, model: PreTrainedModel | StreamedModel, structure: Structure, batches: Sequence[torch.Tensor]
    ) -> None:
        self.states: list[torch.Tensor] = []
        self.layer = 0
        self._streamed = model if isinstance(model, StreamedModel) else None
        self._model, self._path = in_memory(model), blocks_path(structure)
        # Without padding the calls of two batches differ in the residual stream alone, if they are of one shape.
        self._given: dict[int, list[Given]] = {}
        for batch in batches:
            self._enter(batch.to(self._model.device))

    @torch.inference_mode()
    def _enter(self, batch: torch.Tensor) -> None:
        """Catch what the first block sees of a batch, and how every block is called."""
        found: list[Given] = []

        def note(state: torch.Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not found:
                self.states.append(state)
            found.append((arguments, keywords))

        with _stand_ins(self._model, self._path, note), suppress(Ended):
            # No mask: a batch without padding needs none of its own.
            backbone(self._model)(input_ids=batch, use_cache=False)
        self._given.setdefault(len(batch), found)

    @property
    def block(self) -> torch.nn.Module:
        """The next block."""
        module: torch.nn.Module = self._model.get_submodule(f"{self._path}.{self.layer}")
        return module

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the next block in memory for the length of a `with` block, at whose end the walk is behind it.

        What is changed in a streamed block is gone then; that of a loaded model stays.
        """
        with nullcontext() if self._streamed is None else self._streamed.holding([self.layer]):
            yield
        self.layer += 1

    def look(self) -> None:
        """Run all batches through the next block for its hooks, which may end it; they stay where they are."""
        for number in range(len(self.states)):
            with suppress(Ended):
                self._output(number)

    def advance(self) -> None:
        """Run all batches through the next block as it is now; their states become what it puts out."""
        for number, output in enumerate(self.outputs()):
            self.states[number] = output

    def outputs(self) -> Iterator[torch.Tensor]:
        """Yield what the next block makes of each batch."""
        for number in range(len(self.states)):
            yield self._output(number)

    @torch.inference_mode()
    def _output(self, number: int) -> torch.Tensor:
        state = self.states[number]
        arguments, keywords = self._given[len(state)][self.layer]
        return first_tensor(self.block(state, *arguments, **keywords))


class _StandIn(torch.nn.Module):
    """Takes the place of a block and hands the residual stream on."""

    def __init__(self, note: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], None], last: bool) -> None:
        super().__init__()
        self._note, self._last = note, last

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Note the call."""
        self._note(hidden_states, arguments, keywords)
        if self._last:
            # What stands behind the blocks is not run.
            raise Ended
        return hidden_states


@contextmanager
def _stand_ins(
    model: PreTrainedModel, path: str, note: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    parent_path, _, name = path.rpartition(".")
    parent, whole = model.get_submodule(parent_path), model.get_submodule(path)
    assert isinstance(whole, torch.nn.ModuleList)
    count = len(whole)
    setattr(parent, name, torch.nn.ModuleList(_StandIn(note, number == count - 1) for number in range(count)))
    try:
        yield
    finally:
        setattr(parent, name, whole)
