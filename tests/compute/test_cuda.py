"""What holds on a GPU; the other tests run there as well, on whatever device `--device auto` finds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery import prune, unlearn
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute import sparsegpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("group", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (33, 200), (70, 384)])
def test_the_kernel_of_sparsegpt_is_the_plain_loop(
    rows: int, width: int, group: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    draw = torch.Generator().manual_seed(rows)
    inputs = torch.randn(2 * width, width, generator=draw) * torch.rand(width, generator=draw)
    # Stored the other way round, as GPT-2's matrices are.
    weight = torch.randn(width, rows, generator=draw).T.cuda()
    factor = sparsegpt.factorise((inputs.T @ inputs).cuda(), 0.01, "w")
    asked: list[bool] = []
    suits = sparsegpt.suits_kernel
    monkeypatch.setattr(sparsegpt, "suits_kernel", lambda part: asked.append(suits(part)) or asked[-1])
    found = sparsegpt.prune_matrix(weight, factor, 0.5, group)
    assert all(asked)
    monkeypatch.setattr(sparsegpt, "suits_kernel", lambda _part: False)
    wanted = sparsegpt.prune_matrix(weight, factor, 0.5, group)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def zeros(root: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(root)
    return {name: torch.from_numpy(checkpoint.read(name) == 0) for name in checkpoint.tensors}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_both_devices_zero_the_same(method: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(f'{{"text": "row {i} of some text, {i * i} letters of it"}}' for i in range(40)))
    options: dict[str, Any] = {"settings": {"samples": 8, "window": 32, "eval.generate": False}, "dtype": "float32"}
    if method == "magnitude":
        options["settings"] = {"eval.generate": False}
    else:
        options["calibration"] = text
    source = checkpoints["sharded_llama"]
    for device in ("cpu", "cuda"):
        prune(source, method=method, sparsity=0.5, device=device, out=tmp_path / device, **options)
    found = [zeros(tmp_path / device) for device in ("cpu", "cuda")]
    assert sum(int(mask.sum()) for mask in found[0].values()) > 1000
    same = sum(int((mask == found[1][name]).sum()) for name, mask in found[0].items())
    assert same >= 0.995 * sum(mask.numel() for mask in found[0].values())


def test_one_seed_gives_the_same_bytes_and_devices_take_turns(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    digests = []
    settings = {"max_steps": 4, "train": "full", "roles": "all", "eval.generate": False, "dropout": 0.1}
    for number, device in enumerate(("cpu", "cuda", "cuda", "cpu")):
        unlearn(checkpoints["gpt2"], method="flat", device=device, out=tmp_path / str(number), guard="none",
                until="none", settings=settings, dtype="float32", **data_files)  # fmt: skip
        digests.append(hashlib.sha256((tmp_path / str(number) / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[3]
    assert digests[1] == digests[2]
    assert not torch.are_deterministic_algorithms_enabled()


def test_memory_is_predicted_for_the_device(checkpoints: dict[str, Path], data_files: dict[str, Path]) -> None:
    options: dict[str, Any] = {"method": "flat", "guard": "none", "until": "none", "dry_run": True, **data_files}
    memory = unlearn(checkpoints["gpt2"], device="cuda", **options).manifest["memory"]
    assert memory["of"] == "device"
    assert 0 < max(memory["phases"].values()) < 2**30
