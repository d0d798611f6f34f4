"""Loading: what is refused, with which exit code, and what the message names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsurgery.compute.device import resolve_device, resolve_dtype
from llmsurgery.compute.load import load_model, load_tokenizer, require_finite_values
from llmsurgery.compute.source import resolve_source
from llmsurgery.errors import DamagedError, InputError, ResourceError, SurgeryError, UnsupportedError, UsageError

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["tied_llama"], tmp_path / "model"))


def test_loaded_model_is_frozen_and_in_the_asked_dtype(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["sharded_llama"], torch.float32, CPU)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def rename(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.down.weight"] = tensors.pop(DOWN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(DOWN), ["missing", DOWN]),
        (lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}), ["unexpected", "model.extra.weight"]),
        (rename, ["missing", DOWN]),
        (lambda tensors: tensors.update({DOWN: torch.zeros(3, 3)}), ["mismatched", DOWN]),
        (lambda tensors: tensors[DOWN][3].fill_(torch.nan), [DOWN, "NaN or Inf"]),
        (lambda tensors: tensors["model.norm.weight"][0].fill_(-torch.inf), ["model.norm.weight", "NaN or Inf"]),
    ],
)
def test_damaged_weights_are_refused_by_name(change: Callable[[Tensors], object], said: list[str], copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError) as caught:
        load_model(copy, torch.float32, CPU)
    assert caught.value.exit_code == 8
    for part in said:
        assert part in caught.value.what


def test_truncated_weights_are_damaged(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(DamagedError):
        load_model(copy, torch.float32, CPU)


def test_model_class_that_transformers_lacks_is_unsupported(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "quillformer"}))
    with pytest.raises(UnsupportedError, match="cannot build the model") as caught:
        load_model(copy, torch.float32, CPU)
    assert "quillformer" in caught.value.why


def test_tokenizer_must_be_there_and_end_sequences(copy: Path) -> None:
    assert load_tokenizer(copy).eos_token_id == 257
    settings = copy / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    with pytest.raises(UnsupportedError, match="no end-of-sequence token"):
        load_tokenizer(copy)
    for path in (settings, copy / "tokenizer.json"):
        path.unlink()
    with pytest.raises(InputError, match="no usable tokenizer") as caught:
        load_tokenizer(copy)
    assert str(copy) in caught.value.what


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "CUDA", ""])
def test_unknown_device_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device") as caught:
        resolve_device(name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("devices", [0, 2])
def test_devices_are_checked_against_the_machine(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if devices else "cpu")
    with pytest.raises(ResourceError, match="not there") as caught:
        resolve_device("cuda:2")
    assert caught.value.exit_code == 7
    assert f"{devices} CUDA devices" in caught.value.why
    if devices:
        assert resolve_device("cuda:1") == torch.device("cuda", 1)
    else:
        with pytest.raises(ResourceError):
            resolve_device("cuda")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("float16", "F32", CPU) == torch.float16
    gpu = torch.device("cuda")
    assert [resolve_dtype("auto", stored, gpu) for stored in ("BF16", "F16", "F32", "F64")] == [
        torch.bfloat16, torch.float16, torch.float32, torch.float32,
    ]  # fmt: skip
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("llmsurgery.compute.device.has_native_bfloat16", lambda native=native: native)
        assert resolve_dtype("auto", "BF16", CPU) == expected
        assert resolve_dtype("auto", "F16", CPU) == torch.float32
    with pytest.raises(UsageError, match="unknown dtype 'fp32'") as caught:
        resolve_dtype("fp32", "F32", CPU)
    assert "float32" in caught.value.why


def test_source_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["none", "./none", "../none/at/all", "models/none.gguf", "models/none.bin"])
def test_missing_path_is_an_input_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist") as caught:
        resolve_source(name)
    assert caught.value.exit_code == 3
    assert name in caught.value.what


# The last two look like a hub id but are none.
@pytest.mark.parametrize("name", ["nobody-here/no-such-model", "models/my--model", "models/llama."])
def test_hub_id_without_network_is_an_input_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="neither a directory nor a cached") as caught:
        resolve_source(name)
    assert name in caught.value.what


@pytest.mark.parametrize(
    ("name", "why"), [("pytorch_model.bin", "pickle"), ("model.pt", "pickle"), ("model.safetensors", "directory")]
)
def test_file_that_is_no_checkpoint_is_unsupported(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(SurgeryError) as caught:
        resolve_source(tmp_path / name)
    assert caught.value.exit_code == 4
    assert why in caught.value.why
    assert "directory" in caught.value.fix


@pytest.mark.parametrize(
    "content", [b"", b"no model at all " * 9, b"GGUF", b"GGUF\x03\0\0\0" + b"\x01" * 99, b"GGUF\x03\0\0\0" + bytes(16)]
)
def test_unreadable_gguf_is_an_input_error(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSURGERY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="could not be read as GGUF") as caught:
        resolve_source(path)
    assert str(path) in caught.value.what
    # Nothing half-made stays in the cache.
    assert not list((tmp_path / "cache" / "gguf").iterdir())


def test_large_weights_are_finite_and_infinite_ones_that_cancel_are_not() -> None:
    require_finite_values("large", torch.full((8,), 3e38))
    require_finite_values("none", torch.empty(0))
    for bad in (torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), -float("inf")])):
        with pytest.raises(DamagedError, match="bad"):
            require_finite_values("bad", bad)
    with pytest.raises(UsageError, match="float16"):
        require_finite_values("half", torch.tensor([float("inf")], dtype=torch.float16))
