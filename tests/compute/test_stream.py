"""Streamed models compute what loaded ones do, and read no more than they must."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.lockstep import THREAD
from llmsurgery.compute.residual import block_modules
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.errors import DamagedError, UsageError

from ..builders import BUILDERS
from ..builders.large import write_large

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
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Stored name -> how many of its entries were read."""
    counts: Counter[str] = Counter()
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str, *rows: int) -> Any:
        values = read(self, name, *rows)
        counts[name] += values.size
        return values

    monkeypatch.setattr(Checkpoint, "read", counted)
    return counts


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


def names_of(root: Path, layers: set[int | None]) -> set[str]:
    return {tensor.stored for tensor in structure(root).tensors if tensor.layer in layers}


def test_each_block_is_read_once_for_all_calls(checkpoints: dict[str, Path], reads: Counter[str]) -> None:
    root = checkpoints["sharded_llama"]
    streamed = opened(root)
    embedding = Counter(reads)
    assert set(embedding) == {"model.embed_tokens.weight"}
    order: list[tuple[int, int]] = []
    for layer, block in enumerate(block_modules(streamed.model, structure(root))):
        block.register_forward_pre_hook(lambda _module, arguments, at=layer: order.append((at, arguments[0].shape[1])))
    streamed.run([logits(streamed.model, ids) for ids in BATCHES])
    assert order == [(0, 39), (0, 30), (0, 7), (1, 39), (1, 30), (1, 7)]
    sizes = {name: info.size for name, info in Checkpoint.open(root).tensors.items()}
    assert reads == sizes
    # A second run reads the blocks again, but not what lies around them.
    streamed.run([logits(streamed.model, BATCHES[0])])
    blocks = names_of(root, {0, 1})
    assert {name for name, count in reads.items() if count == 2 * sizes[name]} == blocks
    assert streamed.blocks_read == 4


def test_nothing_behind_the_last_block_asked_for_is_read(checkpoints: dict[str, Path], reads: Counter[str]) -> None:
    root = checkpoints["mixtral"]
    streamed = opened(root)
    seen: list[int] = []
    for block in block_modules(streamed.model, structure(root)):
        block.register_forward_hook(lambda *_: seen.append(1))
    assert streamed.run([logits(streamed.model, ids) for ids in BATCHES], until=0) == [None] * 3
    assert len(seen) == 3
    assert set(reads) == {"model.embed_tokens.weight"} | names_of(root, {0})
    assert streamed.run([logits(streamed.model, ids) for ids in BATCHES], until=1) == [None] * 3
    assert len(seen) == 9
    assert names_of(root, {None}) - set(reads) == {"model.norm.weight", "lm_head.weight"}
    with pytest.raises(UsageError, match="layer 2 does not exist"):
        streamed.run([], until=2)


def test_calls_of_several_forwards_and_of_none(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["gpt2"]
    streamed, loaded = opened(root), load_model(root, torch.float32, CPU)

    def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)

    calls: list[Callable[[], Any]] = [lambda ids=ids: generate(streamed.model, ids) for ids in BATCHES]  # type: ignore[misc]
    found = streamed.run([*calls, lambda: "no forward", logits(streamed.model, BATCHES[0])])
    # Four tokens of three batches are four times two blocks.
    assert streamed.blocks_read == 8
    assert found[3] == "no forward"
    for one, ids in zip(found, BATCHES, strict=False):
        assert torch.equal(one, generate(loaded, ids))
    assert streamed.run([]) == []


class TroubleError(Exception):
    pass


@pytest.mark.parametrize("layer", [0, 1])
def test_exceptions_reach_the_caller_and_end_all_threads(layer: int, checkpoints: dict[str, Path]) -> None:
    root = checkpoints["tied_llama"]
    streamed = opened(root)
    block = block_modules(streamed.model, structure(root))[layer]

    def fail(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[1] == 30:
            raise TroubleError

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(TroubleError):
        streamed.run([logits(streamed.model, ids) for ids in BATCHES])
    assert all(thread.name != THREAD for thread in threading.enumerate())
    assert all(tensor.is_meta for tensor in block.parameters())
    handle.remove()
    # And the model is fit for the next run.
    found = streamed.run([logits(streamed.model, BATCHES[0])])[0]
    assert found is not None
    assert torch.equal(found, logits(load_model(root, torch.float32, CPU), BATCHES[0])())


def test_trouble_while_reading_a_block_ends_all_threads(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(checkpoints["tied_llama"], tmp_path / "model")
    file = root / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    streamed = opened(root)
    streamed.run([logits(streamed.model, BATCHES[0])], until=0)
    with pytest.raises(DamagedError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        streamed.run([logits(streamed.model, ids) for ids in BATCHES])
    assert all(thread.name != THREAD for thread in threading.enumerate())


def test_held_blocks_stay_and_may_be_changed(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["tied_llama"]
    streamed, loaded = opened(root), load_model(root, torch.float32, CPU)
    path = "model.layers.1.mlp.down_proj"
    unchanged = logits(loaded, BATCHES[0])()
    for model in (loaded, streamed.model):
        with streamed.holding([1]), streamed.holding([0, 1]):
            weight = model.get_submodule(path).weight
            assert isinstance(weight, torch.nn.Parameter)
            with torch.no_grad():
                weight.mul_(-1)
            found = logits(model, BATCHES[0])()
            for again in streamed.run([logits(model, BATCHES[0])] * 2):
                assert again is not None
                torch.testing.assert_close(again, found)
            assert not torch.allclose(found, unchanged, atol=1e-3)
    assert streamed.blocks_read == 4
    assert streamed.model.get_submodule(path).weight.is_meta  # type: ignore[union-attr]
    # Outside of the block it is the stored model again.
    torch.testing.assert_close(logits(streamed.model, BATCHES[0])(), unchanged)
    with pytest.raises(UsageError, match="layer 7"), streamed.holding([7]):
        pass


def test_gradients_flow_through_held_blocks(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["tied_llama"]
    streamed, loaded = opened(root), load_model(root, torch.float32, CPU)
    found = []
    with streamed.holding([0, 1]):
        for model in (streamed.model, loaded):
            delta = torch.zeros(32, requires_grad=True)
            add = model.get_submodule("model.layers.0").register_forward_hook(lambda _m, _a, out, d=delta: out + d)
            logits(model, BATCHES[0])().logsumexp(-1).sum().backward()
            add.remove()
            found.append(delta.grad)
    assert float(found[0].abs().max()) > 0
    assert torch.equal(found[0], found[1])


def test_plain_forwards_keep_one_block_in_memory(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["qwen2_moe"]
    streamed, loaded = opened(root), load_model(root, torch.float32, CPU)
    with torch.no_grad():
        assert torch.equal(logits(streamed.model, BATCHES[1])(), logits(loaded, BATCHES[1])())
    assert all(
        tensor.is_meta for block in block_modules(streamed.model, structure(root)) for tensor in block.parameters()
    )


def test_a_converted_block_takes_the_memory_of_the_one_before(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["sharded_llama"]
    other = torch.bfloat16 if Checkpoint.open(root).info("model.embed_tokens.weight").dtype == "F32" else torch.float32
    streamed = opened(root, other)
    places: list[set[int]] = []
    blocks = block_modules(streamed.model, structure(root))
    for block in blocks:
        block.register_forward_pre_hook(
            lambda module, _arguments: places.append({tensor.data_ptr() for tensor in module.parameters()})
        )
    streamed.run([logits(streamed.model, ids) for ids in BATCHES])
    count = len(BATCHES)
    assert len(places) == len(blocks) * count
    assert places[0] == places[count], "both blocks have the same shapes"
    # What comes after a run needs memory too: none is kept.
    assert not streamed._residents._spare


def test_windows_bound_the_states_that_wait(checkpoints: dict[str, Path]) -> None:
    streamed = opened(checkpoints["tied_llama"])
    # 32 fp32 numbers per token, twice.
    assert streamed.windows([10, 10, 10, 40, 1], limit=20 * 256) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert streamed.windows([10, 10, 10]) == [slice(0, 3)]
    assert streamed.windows([]) == []


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.stream import StreamedModel
root, limit = Path(sys.argv[1]), int(sys.argv[2])
checkpoint = Checkpoint.open(root)
structure, cpu = detect(checkpoint.config, checkpoint.tensors), torch.device("cpu")
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
ids = torch.arange(1, 9)[None]
streamed = StreamedModel.open(root, structure, torch.float32, cpu)
(logits,) = streamed.run([lambda: streamed.model(input_ids=ids, use_cache=False).logits])
print("streamed", float(logits.double().abs().sum()), flush=True)
load_model(root, torch.float32, cpu)
print("loaded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on data and their reading are Linux's")
def test_models_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    small = write_large(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored > 200e6
    # A third of what is stored in bf16, a sixth of what it takes in fp32; a block takes 17 MB.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", MEASURE, str(tmp_path), str(stored // 3)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    with torch.inference_mode():
        wanted = small.float()(input_ids=torch.arange(1, 9)[None], use_cache=False).logits
    way, value = done.stdout.split()
    assert (way, float(value)) == ("streamed", pytest.approx(float(wanted.double().abs().sum()), rel=1e-5))
    # The plain loader fails under the same limit, for want of memory and of nothing else.
    assert done.returncode != 0
    assert "allocate memory" in done.stderr
