"""A causal language model of which only what runs is in memory: blocks are read from disk as a forward reaches them.

Nothing is mapped: tensors are read at their byte offsets into memory that is freed again, so that a limit on memory
holds. The model itself is the stock one, built without weights; no architecture has code of its own here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.blocks import blocks_path
from llmsurgery.compute.entrances import Entrances, batch_digest
from llmsurgery.compute.load import STORED, model_of_headers
from llmsurgery.compute.lockstep import Call, Ended, current_call, private_hooks
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.residents import Residents
from llmsurgery.compute.stored import fill_constants
from llmsurgery.compute.view import weight_view
from llmsurgery.errors import UsageError

T = TypeVar("T")

WINDOW_BYTES = 512 << 20
"""Hidden states that wait between blocks at once, if a caller leaves it to `windows`."""

WINDOW_CALLS = 256
"""Forwards that wait at once: each has a thread."""


class StreamedModel:
    """A causal language model of which only what runs is in memory.

    A plain forward of `model` works too and reads every block once; `run` takes many through a block before it is
    dropped. Blocks inside `holding` may be changed, and tensors inside `editing` replaced; what was changed is gone
    with the `with` block.

    Attributes:
        model: The stock model. Its embedding is loaded, final norm and head once a forward has reached them, its
            blocks only while they run.
        blocks_read: How often a block was read so far.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, structure: Structure, device: torch.device):
        self.model = model
        self.blocks_read = 0
        self._structure, self._device = structure, device
        self._residents = Residents(model, checkpoint, structure, device)
        self._held: set[int] = set()
        self._loose: int | None = None
        self._until: int | None = None
        self._since: int | None = None
        self._entrances = Entrances()
        self._tail = False

    @classmethod
    def open(
        cls,
        root: Path,
        structure: Structure,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> StreamedModel:
        """Open a checkpoint; config, headers and the embedding are read.

        Args:
            root: Checkpoint directory.
            structure: Its roles.
            dtype: Compute dtype.
            device: Where the model runs.
            trust_remote_code: Run model code that the checkpoint brings.

        Raises:
            DamagedError: Stored tensors are missing, unexpected or of the wrong shape, or hold NaN or Inf.
            UnsupportedError: transformers has no class for it.
        """
        checkpoint = Checkpoint.open(root)
        model = model_of_headers(checkpoint, dtype, trust_remote_code, structure.family.buffers)
        fill_constants(model, device)
        streamed = cls(model, checkpoint, structure, device)
        streamed._residents.load(
            [tensor for tensor in structure.tensors if tensor.layer is None and tensor.role.startswith("embed")]
        )
        for number, path in enumerate([*streamed._paths(), structure.family.roles["norm.final"]]):
            module = model.get_submodule(path)
            module.register_forward_pre_hook(streamed._arrival(number), prepend=True, with_kwargs=True)
            if number < streamed.blocks:
                module.forward = _skippable(number, module.forward)
        return streamed

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self._structure.layers

    def _paths(self) -> list[str]:
        path = blocks_path(self._structure)
        return [f"{path}.{layer}" for layer in range(self._structure.layers)]

    def _arrival(self, place: int) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return the hook of a block, or of the final norm, which stands behind the last block."""

        def arrive(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            call = current_call()
            if call is None:
                self._leave()
                self._enter(place)
                self._loose = place
            elif self._until is not None and place > self._until:
                raise Ended
            else:
                self._note(call, place, arguments, keywords)
                if call.start is None or place >= call.start[0]:
                    call.halt(place)

        return arrive

    def _note(self, call: Call[Any], place: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """See where a forward may begin, and keep what enters a marked block."""
        if self._since is None or not self._entrances.marks:
            return
        if place == 0:
            call.batch = batch_digest(arguments, keywords)
            call.start = self._entrances.find(call.batch, self._since)
        # Blocks that are skipped are not given what enters them.
        runs = call.start is None or place > call.start[0]
        if runs and call.batch is not None and place < self.blocks and arguments:
            self._entrances.keep(call.batch, place, arguments[0])

    @contextmanager
    def holding(self, layers: Iterable[int]) -> Iterator[None]:
        """Keep some blocks in memory for the length of a `with` block.

        Args:
            layers: Block numbers.
        """
        added: list[int] = []
        try:
            for layer in dict.fromkeys(layers):
                self._require_block(layer)
                if layer not in self._held:
                    if self._loose != layer:
                        self._enter(layer)
                    self._held.add(layer)
                    added.append(layer)
            yield
        finally:
            for layer in added:
                self._held.discard(layer)
                self._drop(layer)
            if self._loose in added:
                self._loose = None

    @contextmanager
    def editing(self, layers: Iterable[int]) -> Iterator[None]:
        """Let tensors of some blocks be replaced for the length of a `with` block; no block stays in memory.

        What enters these blocks is kept for as long as nothing before them is replaced, behind the `with` block too,
        so that `run` with `since` does not go through the blocks before them again.

        Args:
            layers: Block numbers.
        """
        numbers = sorted(set(layers))
        for layer in numbers:
            self._require_block(layer)
        self._entrances.marks.update(numbers)
        try:
            yield
        finally:
            self._leave()
            self._residents.replaced.clear()
            self._entrances.forget_behind(numbers[0])

    def replacement(self, target: RoleTensor) -> torch.Tensor:
        """Return memory for the new values of a stored tensor, in its stored shape; blocks are read with them then.

        Args:
            target: A tensor of a block that is being edited, no routed expert's.
        """
        assert target.layer is not None
        self._leave()
        self._entrances.forget_behind(target.layer)
        if target.layer in self._held:
            return weight_view(self.model, target)
        return self._residents.replaced.setdefault(target.stored, torch.empty(target.shape, dtype=STORED[target.dtype]))

    def run(
        self,
        calls: Sequence[Callable[[], T]],
        until: int | None = None,
        advanced: Callable[[], None] | None = None,
        since: int | None = None,
    ) -> list[T | None]:
        """Run forwards in lockstep: each block is read once for all of them.

        Args:
            calls: Each runs one forward of `model` on one batch, in inference mode and in a thread of its own; they
                take turns, so that no two run at once. A hook that a call registers sees this call alone; a hook
                registered before `run` sees all. A call that runs several forwards has the blocks read again.
            until: End every forward behind this block, with the result None; later blocks, the final norm and the
                head are not read. None: run to the end.
            advanced: Called when all forwards have left a block.
            since: First block that the calls look at. A forward of a batch that went through the model before, while
                blocks were `editing`, may begin there or a little earlier. None: at the first block.

        Returns:
            What the calls returned, in their order.

        Raises:
            UsageError: `until` is not a block of the model.
            BaseException: The first that a call raised; all threads have ended by then.
        """
        if until is not None:
            self._require_block(until)
        self._leave()
        self._until, self._since = until, since
        threads = [Call(work, self._device) for work in calls]
        try:
            with private_hooks(self.model):
                for thread in threads:
                    thread.advance()
                self._sweep(threads, advanced)
        finally:
            for thread in threads:
                thread.end()
            self._until = self._since = None
            # What comes between two runs needs memory too.
            self._residents.release()
        return [thread.result for thread in threads]

    def _sweep(self, threads: Sequence[Call[T]], advanced: Callable[[], None] | None) -> None:
        """Go over the blocks until no forward waits for one."""
        place = 0
        while waiting := sorted({thread.place for thread in threads if thread.place is not None}):
            # Forwards that begin anew wait for an earlier block.
            place = next((number for number in waiting if number >= place), waiting[0])
            self._enter(place)
            try:
                for thread in threads:
                    if thread.place == place:
                        thread.advance()
            finally:
                self._drop(place)
            if advanced is not None:
                advanced()

    def windows(self, tokens: Sequence[int], limit: int = WINDOW_BYTES) -> list[slice]:
        """Cut a sequence of calls into parts whose hidden states fit into memory together.

        Args:
            tokens: Tokens of each call's batch, padding included.
            limit: Bytes of hidden states.
        """
        width = self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize
        result, start, total = [], 0, 0
        for number, count in enumerate(tokens):
            # What goes into a block, and what the residual adds to it.
            total += 2 * width * count
            if number > start and (total > limit or number - start >= WINDOW_CALLS):
                result.append(slice(start, number))
                start, total = number, 2 * width * count
        return [*result, slice(start, len(tokens))] if len(tokens) else []

    def load_head(self) -> None:
        """Load the final norm and the head, if they are not there yet; they stay."""
        if not self._tail:
            outside = [tensor for tensor in self._structure.tensors if tensor.layer is None]
            self._residents.load([tensor for tensor in outside if not tensor.role.startswith("embed")])
            self._tail = True

    def _require_block(self, layer: int) -> None:
        if not 0 <= layer < self._structure.layers:
            raise UsageError(
                f"layer {layer} does not exist", f"the model has layers 0 to {self._structure.layers - 1}", ""
            )

    def _enter(self, place: int) -> None:
        """Have a block in memory; behind the last one the final norm and the head."""
        if place == self._structure.layers:
            self.load_head()
        elif place not in self._held:
            self._residents.load_block(place, self._paths()[place])
            self.blocks_read += 1

    def _leave(self) -> None:
        """Drop the block that a forward outside of `run` has left behind."""
        if self._loose is not None:
            self._drop(self._loose)
        self._loose = None

    def _drop(self, place: int) -> None:
        if place != self._structure.layers and place not in self._held:
            self._residents.drop(place)


def _skippable(place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a block that a call which begins behind it does not run."""

    @wraps(forward)
    def skippable(*arguments: Any, **keywords: Any) -> Any:
        call = current_call()
        if call is not None and call.start is not None and place < call.start[0]:
            return call.start[1]
        return forward(*arguments, **keywords)

    return skippable


def run_calls(
    model: PreTrainedModel | StreamedModel,
    calls: Sequence[Callable[[], T]],
    tokens: Sequence[int],
    steps: Sequence[int],
    progress: Progress,
    name: str,
) -> Iterator[T]:
    """Yield the result of each call, each one forward, whether the model is in memory or streamed.

    Args:
        model: A causal language model.
        calls: Forwards of it, or of what it streams.
        tokens: Tokens of each call's batch, padding included.
        steps: What each call counts in the progress display; if the model is streamed, blocks count instead.
        progress: Told of every call, or of every block.
        name: Name of the task in the progress display.
    """
    if not isinstance(model, StreamedModel):
        with progress.task(name, sum(steps)) as tick:
            for call, count in zip(calls, steps, strict=True):
                yield call()
                tick(count)
        return
    windows = model.windows(tokens)
    with progress.task(name, len(windows) * (model.blocks + 1)) as tick:
        for window in windows:
            for result in model.run(calls[window], advanced=tick):
                assert result is not None
                yield result


def in_memory(model: PreTrainedModel | StreamedModel) -> PreTrainedModel:
    """Return the stock model that a model argument stands for."""
    return model.model if isinstance(model, StreamedModel) else model
