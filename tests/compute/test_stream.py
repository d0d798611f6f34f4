"""Streamed models compute what loaded ones do, and read no more than they must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.residual import block_modules
from llmsurgery.compute.stream import StreamedModel

from ..builders import BUILDERS

CPU = torch.device("cpu")
BATCHES = [torch.arange(1, 40)[None], torch.arange(60).reshape(2, 30) + 100, torch.arange(5, 12)[None]]


def structure(root: Path) -> Structure:
    checkpoint = Checkpoint.open(root)
    return detect(checkpoint.config, checkpoint.tensors)


def opened(root: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel.open(root, structure(root), dtype, CPU)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def caught(
    model: torch.nn.Module, blocks: list[torch.nn.Module], ids: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    """A forward with hooks of its own that returns the input of every block."""

    def run() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def catch(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append(arguments[0] if arguments else keywords["hidden_states"])

        handles = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in blocks]
        try:
            logits(model, ids)()
        finally:
            for handle in handles:
                handle.remove()
        return found

    return run


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Stored name -> how many of its entries were read."""
    counts: Counter[str] = Counter()
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str, *rows: int) -> Any:
        values = read(self, name, *rows)
        counts[name] += values.size
        return values

    monkeypatch.setattr(Checkpoint, "read", counted)
    yield counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", BUILDERS)
def test_every_architecture_computes_what_the_loaded_model_does(
    architecture: str, dtype: torch.dtype, checkpoints: dict[str, Path]
) -> None:
    root = checkpoints[architecture]
    loaded = load_model(root, dtype, CPU)
    streamed = opened(root, dtype)
    with torch.inference_mode():
        wanted = [logits(loaded, ids)() for ids in BATCHES]
        inputs = [caught(loaded, block_modules(loaded, structure(root)), ids)() for ids in BATCHES]
    found = streamed.run([logits(streamed.model, ids) for ids in BATCHES])
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    blocks = block_modules(streamed.model, structure(root))
    for ids, others in zip(streamed.run([caught(streamed.model, blocks, ids) for ids in BATCHES]), inputs, strict=True):
        assert ids is not None
        assert len(ids) == len(others) == 2
        assert all(torch.equal(one, other) for one, other in zip(ids, others, strict=True))
    for block in blocks:
        assert all(tensor.is_meta for tensor in block.parameters())
