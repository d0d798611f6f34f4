"""Quantised training and automatic batches, end to end: what is written, recorded, replayed, refused."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llmsurgery import unlearn
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.cli.app import run
from llmsurgery.compute import head
from llmsurgery.edits.kinds import LowRank
from llmsurgery.errors import SurgeryError, UnsupportedError, UsageError
from llmsurgery.evaluate import likelihood
from llmsurgery.run import forms, operate, training

FAST = {"max_steps": 3, "lr": 0.01, "eval.generate": False}
DTYPES = {
    "BF16": (torch.bfloat16, torch.int16),
    "F16": (torch.float16, torch.int16),
    "F32": (torch.float32, torch.int32),
}


def flat(model: Path, data: dict[str, Path], out: Path, **options: Any) -> dict[str, Any]:
    settings = {**FAST, **options.pop("settings", {})}
    defaults: dict[str, Any] = {"until": "none", "guard": "none", **options}
    return dict(unlearn(model, method="flat", out=out, settings=settings, **defaults, **data).manifest)


def distance_to_nearest(exact: np.ndarray, code: str) -> np.ndarray:
    """How far float64 values are from the nearest value of a dtype."""
    dtype, bits = DTYPES[code]
    # torch goes to 16 bits by way of float32 and rounds twice: the nearest may be the neighbour of what it gives.
    found = torch.from_numpy(exact).to(dtype).view(bits)
    around = [(found + step).view(dtype).double().numpy() for step in (-1, 0, 1)]
    return np.nanmin([np.abs(values - exact) for values in around], axis=0)


def tree(out: Path) -> dict[str, object]:
    """Digests of all files but the manifest, and the manifest without what may differ between two equal runs."""
    manifest = json.loads((out / "surgery.json").read_text())
    del manifest["cost"], manifest["out"]
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "surgery.json")
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files} | {"": manifest}


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2", "phi3", "mixtral", "deepseek_v3"])
def test_the_edit_lands_in_the_weights_as_stored(
    architecture: str,
    mode: str,
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    edits: list[LowRank] = []
    trained: list[int] = []
    write, load = forms.write_edits, training.load_for_training

    def written(checkpoint: Any, publication: Any, given: Any, *more: Any) -> Any:
        edits.extend(given)
        return write(checkpoint, publication, given, *more)

    def loaded(prepared: Any) -> Any:
        model = load(prepared)
        kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
        trained.append(sum(isinstance(module, kinds) for module in model.modules()))
        return model

    monkeypatch.setattr(forms, "write_edits", written)
    monkeypatch.setattr(training, "load_for_training", loaded)
    model = checkpoints[architecture]
    manifest = flat(model, data_files, tmp_path / "out", quantize=mode)
    assert trained[0] >= len(edits) > 0
    source, result = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    changes = {edit.name: edit.u @ edit.v for edit in edits}
    assert set(manifest["tensors"]) == set(changes)
    for name, info in source.tensors.items():
        if name not in changes:
            assert result.read(name).tobytes() == source.read(name).tobytes(), name
            continue
        assert np.abs(changes[name]).max() > 1e-4
        exact = decode(source.read(name), info.dtype).astype(np.float64) + changes[name]
        written = decode(result.read(name), info.dtype).astype(np.float64)
        assert np.array_equal(np.abs(written - exact), distance_to_nearest(exact, info.dtype)), name
    operation = manifest["operations"][0]
    assert operation["quantize"] == mode
    assert manifest["versions"]["bitsandbytes"] == bitsandbytes.__version__
    plain = flat(model, data_files, tmp_path / "plain")
    for name, metric in plain["metrics"].items():
        assert manifest["metrics"][name]["before"] == metric["before"], name
    assert "bitsandbytes" not in plain["versions"]
    # Training saw other weights than the plain run: the first step's loss tells.
    assert operation["record"]["first_loss"] != plain["operations"][0]["record"]["first_loss"]


def test_guard_and_stop_rule_of_a_quantised_run(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    kept: list[Any] = []
    make = operate.make_session

    def session(*arguments: Any) -> Any:
        kept.append((arguments[2], made := make(*arguments)))
        # At the first step nothing has moved: the model in training still answers as the guard recorded.
        assert made.guard is not None
        assert float(made.guard.loss(arguments[1], [0, 1], None)) == pytest.approx(0, abs=1e-5)
        return made

    monkeypatch.setattr(operate, "make_session", session)
    manifest = flat(
        checkpoints["sharded_llama"],
        data_files,
        tmp_path / "out",
        quantize="nf4",
        guard=str(data_files["retain"]),
        until="forget.prob<=1x",
    )
    (watched, _), *_ = kept
    assert watched.baseline == manifest["metrics"]["forget.prob"]["before"]["value"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"quantize": "nf4", "settings": {"train": "full"}}, UsageError, "train=lora"),
        ({"quantize": "int4"}, UsageError, "nf4"),
        ({"batch_size": "automatic"}, UsageError, "auto"),
        ({"batch_size": 0}, UsageError, "from 1 up"),
        ({"settings": {"optimizer": "sgd"}}, UsageError, "adamw8bit"),
    ],
)
def test_refusals_before_any_work(
    options: dict[str, Any],
    error: type[SurgeryError],
    said: str,
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error) as caught:
        flat(checkpoints["tied_llama"], data_files, tmp_path / "out", **options)
    assert said in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"settings": {"optimizer": "adamw8bit"}}])
def test_without_bitsandbytes(
    options: dict[str, Any],
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedError, match="bitsandbytes"):
        flat(checkpoints["tied_llama"], data_files, tmp_path / "out", **options)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, rows: int, from_call: int = 0) -> list[int]:
    """Let forwards of training run out of memory above a number of sequences."""
    sizes: list[int] = []
    forward = head.batch_log_probabilities

    def scarce(model: Any, input_ids: torch.Tensor, *more: Any) -> Any:
        result = forward(model, input_ids, *more)
        if torch.is_grad_enabled():
            sizes.append(len(input_ids))
            if len(input_ids) > rows and len(sizes) > from_call:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(head, "batch_log_probabilities", scarce)
    return sizes


@pytest.mark.parametrize("from_call", [0, 2])
def test_automatic_batch_is_the_run_of_the_number_it_finds(
    from_call: int,
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = checkpoints["sharded_llama"]
    settings = {"dropout": 0.2, "max_steps": 5, "save_every": 2, "guard.prompts": 4, "batch_size": 3}
    with monkeypatch.context() as patch:
        # FLAT has two sequences per row: only single rows fit. Out of memory at the first step, or at the third.
        sizes = short_of_memory(patch, 2, from_call)
        found = flat(model, data_files, tmp_path / "auto", batch_size="auto", settings=settings, guard="self")
    assert sizes[: from_call + 1] == [6] * (from_call + 1)
    assert sizes[from_call + 1 :] == [2] * 15
    operation = found["operations"][0]
    assert operation["batch_size"] == operation["record"]["micro_batch"] == 1
    settings["eval.batch_size"] = operation["evaluation"]["batch_size"]
    assert settings["eval.batch_size"] == 8
    flat(model, data_files, tmp_path / "given", batch_size=1, settings=settings, guard="self")
    assert tree(tmp_path / "auto") == tree(tmp_path / "given")


def test_automatic_batch_of_quantised_training_starts_again(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    model = checkpoints["sharded_llama"]
    with monkeypatch.context() as patch:
        short_of_memory(patch, 2, 2)
        flat(model, data_files, tmp_path / "auto", batch_size="auto", quantize="nf4")
    flat(model, data_files, tmp_path / "given", batch_size=1, quantize="nf4", settings={"eval.batch_size": 8})
    assert tree(tmp_path / "auto") == tree(tmp_path / "given")


def test_a_resumed_run_starts_from_the_micro_batch_it_had_found(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = checkpoints["sharded_llama"], {"max_steps": 6, "save_every": 2}
    with monkeypatch.context() as patch:
        sizes = short_of_memory(patch, 2)
        from llmsurgery.train import loop

        advance = loop._Loop.advance

        def interrupted(self: Any, loss: Callable[..., torch.Tensor]) -> float:
            if self.step == 5:
                raise KeyboardInterrupt
            return advance(self, loss)

        patch.setattr(loop._Loop, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flat(model, data_files, tmp_path / "auto", batch_size="auto", settings=settings)
    assert sizes[0] == 6
    with monkeypatch.context() as patch:
        sizes = short_of_memory(patch, 2)
        flat(model, data_files, tmp_path / "auto", batch_size="auto", settings=settings, resume=True)
    assert set(sizes) == {2}
    flat(model, data_files, tmp_path / "given", batch_size=1, settings={**settings, "eval.batch_size": 8})
    assert tree(tmp_path / "auto") == tree(tmp_path / "given")


def test_scoring_halves_and_the_number_is_recorded(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = checkpoints["tied_llama"], {"eval.generate": True}
    with monkeypatch.context() as patch:
        score = likelihood.batch_statistics

        def scarce(model: Any, input_ids: torch.Tensor, *more: Any) -> Any:
            if len(input_ids) > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return score(model, input_ids, *more)

        patch.setattr(likelihood, "batch_statistics", scarce)
        found = flat(model, data_files, tmp_path / "auto", batch_size="auto", settings=settings)
        with pytest.raises(SurgeryError) as caught:
            flat(model, data_files, tmp_path / "fixed", settings=settings)
        assert caught.value.exit_code == 7
        files = [word for name, path in data_files.items() for word in (f"--{name}", str(path))]
        assert run(["eval", str(model), *files, "--batch-size", "auto", "-q"]) == 0
    assert found["operations"][0]["evaluation"]["batch_size"] == 2
    settings["eval.batch_size"] = 2
    given = found["operations"][0]["batch_size"]
    flat(model, data_files, tmp_path / "given", batch_size=given, settings=settings)
    assert tree(tmp_path / "auto") == tree(tmp_path / "given")


def test_a_row_that_does_not_fit_exits_with_7(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 1)
    with pytest.raises(SurgeryError) as caught:
        flat(checkpoints["tied_llama"], data_files, tmp_path / "out", batch_size="auto")
    assert caught.value.exit_code == 7
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"optimizer": "adamw8bit", "train": "full", "roles": "embed,mlp.up"}),
        ({"quantize": "nf4"}, {"optimizer": "adamw8bit", "rank": 128, "dropout": 0.1}),
    ],
)
def test_interrupted_runs_with_bitsandbytes_go_on_to_the_same_bytes(
    options: dict[str, Any],
    settings: dict[str, Any],
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("bitsandbytes")
    from llmsurgery.train import loop

    model, settings = checkpoints["sharded_llama"], {**settings, "max_steps": 6, "save_every": 2}
    with monkeypatch.context() as patch:
        advance = loop._Loop.advance

        def interrupted(self: Any, loss: Callable[..., torch.Tensor]) -> float:
            if self.step == 5:
                raise KeyboardInterrupt
            return advance(self, loss)

        patch.setattr(loop._Loop, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flat(model, data_files, tmp_path / "out", settings=settings, **options)
    state = tmp_path / "out.partial" / ".llmsurgery-state" / "training-0.safetensors"
    with safe_open(state, "np") as file:
        kept = {str(file.get_tensor(name).dtype) for name in file.keys() if name.endswith("state1")}  # noqa: SIM118
    # Tensors of fewer than 4096 entries keep wide moments.
    assert "uint8" in kept
    flat(model, data_files, tmp_path / "out", settings=settings, resume=True, **options)
    flat(model, data_files, tmp_path / "whole", settings=settings, **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
