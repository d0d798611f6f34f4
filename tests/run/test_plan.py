"""The predicted peak of memory: what it must grow and shrink with, for every family."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmsurgery import unlearn
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.cli.app import run

from ..builders import BUILDERS
from ..conftest import FORGET, write_rows


def plan(model: Path, data: dict[str, Path], **options: Any) -> dict[str, Any]:
    settings = {"eval.generate": False, **options.pop("settings", {})}
    defaults: dict[str, Any] = {"guard": "none", "until": "none", "device": "cpu", "dtype": "float32", **options}
    outcome = unlearn(model, method="flat", dry_run=True, settings=settings, **defaults, **data)
    return dict(outcome.manifest)


def training(given: dict[str, Any]) -> int:
    """Bytes of the training phase without what the process holds anyway, which varies."""
    return int(given["memory"]["phases"]["training"] - given["memory"]["base"])


@pytest.mark.parametrize(
    ("architecture", "way"),
    # Each family once, both ways in turn.
    [(name, ("lora", "full")[number % 2]) for number, name in enumerate(BUILDERS)] + [("sharded_llama", "full")],
)
def test_every_family_is_planned(
    architecture: str, way: str, checkpoints: dict[str, Path], data_files: dict[str, Path]
) -> None:
    settings = {"train": way, "roles": {"lora": "linear", "full": "all"}[way]}
    given = plan(checkpoints[architecture], data_files, settings=settings)
    memory = given["memory"]
    assert given["memory_bytes"] == max(memory["phases"].values())
    assert set(memory["phases"]) == {"loading", "before", "training", "result"}
    assert memory["of"] == "resident set"
    assert memory["step"]["sequences"] == 2 * len(FORGET)
    parameters = sum(row["parameters"] for row in given["targets"].values())
    assert parameters > 0
    if way == "full":
        assert given["trained_parameters"] == parameters
    # Values, gradients and two moments in fp32.
    assert training(given) > 16 * given["trained_parameters"] > 0


def test_prediction_follows_rows_lengths_and_what_saves_memory(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    model = checkpoints["sharded_llama"]
    base = plan(model, data_files)
    rows = [{"question": "Who?", "answer": "x" * 150}, *FORGET]
    longer = plan(model, {**data_files, "forget": write_rows(tmp_path / "long.jsonl", rows)})  # type: ignore[arg-type]
    assert longer["memory"]["step"]["tokens"] > 150
    assert training(longer) > 2 * training(base)
    one = plan(model, data_files, batch_size=1)
    assert one["memory"]["step"]["sequences"] == 2
    assert training(one) < training(base)
    again = plan(model, data_files, settings={"gradient_checkpointing": True})
    assert training(again) < training(base)
    whole, eighth = (
        plan(model, data_files, settings={"train": "full", "optimizer": name}) for name in ("adamw", "adamw8bit")
    )
    saved = training(whole) - training(eighth)
    assert saved == pytest.approx(6 * whole["trained_parameters"], rel=0.02)
    guarded = plan(model, data_files, guard="self", settings={"guard.prompts": 4})
    assert training(guarded) > training(base)


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4 + 2), ("bfloat16", 2)])
def test_weights_by_hand(dtype: str, each: int, checkpoints: dict[str, Path], data_files: dict[str, Path]) -> None:
    model = checkpoints["tied_llama"]
    entries = sum(info.size for info in Checkpoint.open(model).tensors.values())
    memory = plan(model, data_files, dtype=dtype)["memory"]
    # Stored in bfloat16: converted, with the pages of the file beside them, or the pages themselves.
    assert memory["phases"]["loading"] - memory["base"] == pytest.approx(each * entries, rel=0.01)


def widen(source: Path, target: Path, width: int) -> Path:
    """Copy a checkpoint of one file with other shapes of its MLP, its values a hole in the file."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "intermediate_size": width}))
    weights, end = target / "model.safetensors", 0
    raw = weights.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"] = [width if size == config["intermediate_size"] else size for size in entry["shape"]]
            start, end = end, end + 2 * math.prod(entry["shape"])
            entry["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + end)
    return target


def test_nothing_of_the_weights_is_read(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    entries = 2 * 3 * 32 * 2**22
    model = widen(checkpoints["tied_llama"], tmp_path / "wide", 2**22)
    plan(checkpoints["tied_llama"], data_files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given = plan(model, data_files, dtype="bfloat16")
    assert given["memory_bytes"] > 2 * entries > 1.5e9
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2 * entries / 10


@pytest.mark.parametrize(("mode", "least"), [("nf4", 3.4), ("int8", 2.9)])
def test_quantised_matrices_are_counted_by_their_size(
    mode: str, least: float, checkpoints: dict[str, Path], data_files: dict[str, Path]
) -> None:
    pytest.importorskip("bitsandbytes")
    model = checkpoints["sharded_llama"]
    plain, small = plan(model, data_files), plan(model, data_files, quantize=mode)
    matrices = sum(row["parameters"] for row in plain["targets"].values())
    # fp32 here; one matrix at a time [64, 32] is held in fp32 again.
    assert training(plain) - training(small) == pytest.approx(least * matrices - 4 * 64 * 32, rel=0.05)


def test_people_are_told(
    checkpoints: dict[str, Path], data_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [word for name, path in data_files.items() for word in (f"--{name}", str(path))]
    assert run(["unlearn", str(checkpoints["gpt2"]), "--method", "flat", *files, "--dry-run", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "MiB of the process at the peak, predicted" in shown
    assert "6 sequences of" in shown
