"""`llmsurgery stack`: as checkpoint and as patch, on the right base, and with its conflicts named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsurgery.cli.app import run

from .test_patches import bytes_and_modes, checkpoint_files, document

ATTENTION, MLP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
Make = Callable[..., Path]


@pytest.fixture
def base(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["tied_llama"]


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """A patch that adds a number to some tensors, and a key to a side file."""

    def patch(name: str, add: float, *tensors: str, temperature: float | None = None) -> Path:
        changed = Path(shutil.copytree(base, tmp_path / f"{name}-model"))
        weights = load_file(changed / "model.safetensors")
        for tensor in tensors:
            weights[tensor] = weights[tensor] + torch.tensor(add, dtype=weights[tensor].dtype)
        save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
        if temperature is not None:
            settings = json.loads((changed / "generation_config.json").read_text())
            (changed / "generation_config.json").write_text(json.dumps({**settings, "temperature": temperature}))
        assert run(["diff", str(base), str(changed), "-o", str(tmp_path / name), "-q"]) == 0
        return tmp_path / name

    return patch


def test_two_patches_become_one_checkpoint_or_one_patch(
    base: Path, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stack", str(make("a.patch", 1.0, ATTENTION)), str(make("b.patch", 2.0, MLP, temperature=0.5))]
    words += ["--base", str(base)]
    assert document(words, capsys)["overlaps"] == []
    manifest = document([*words, "-o", str(tmp_path / "out")], capsys)
    assert set(manifest["tensors"]) == {ATTENTION, MLP}
    assert [operation["task"] for operation in manifest["operations"]] == ["stack"]
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert torch.equal(after[ATTENTION], before[ATTENTION] + 1)
    assert torch.equal(after[MLP], before[MLP] + 2)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5
    assert manifest["operations"][0]["patches"][0]["sha256"] in (tmp_path / "out" / "README.md").read_text()
    assert run(["verify", str(tmp_path / "out"), "--base", str(base), "-q"]) == 0
    assert run(["revert", str(tmp_path / "out"), "-o", str(tmp_path / "back"), "-q"]) == 0
    assert bytes_and_modes(tmp_path / "back") == bytes_and_modes(base)
    one = tmp_path / "one.patch"
    assert run([*words, "--save", "patch", "-o", str(one), "-q"]) == 0
    assert run(["apply", str(one), str(base), "-o", str(tmp_path / "applied"), "-q"]) == 0
    assert checkpoint_files(tmp_path / "applied") == checkpoint_files(tmp_path / "out")
    assert not list(tmp_path.glob(".one.patch*"))
    assert run([*words, "--save", "patch", "-o", str(one), "-q"]) == 2


def test_conflicts_are_named_and_the_later_one_wins_where_allowed(
    base: Path, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make("a.patch", 1.0, ATTENTION, MLP), make("b.patch", 2.0, ATTENTION)
    words = ["stack", str(first), str(second), "--base", str(base)]
    capsys.readouterr()
    assert run([*words, "-o", str(tmp_path / "out")]) == 3
    shown = capsys.readouterr().err
    assert f"'{ATTENTION}' (all entries in a.patch, all entries in b.patch)" in shown
    assert MLP not in shown
    assert not (tmp_path / "out").exists()
    assert run([*words, "-o", str(tmp_path / "out"), "--allow-overlap", "-q"]) == 0
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert torch.equal(after[ATTENTION], before[ATTENTION] + 2)
    assert torch.equal(after[MLP], before[MLP] + 1)


def test_other_bases_and_other_numbers_of_patches_are_refused(
    base: Path, checkpoints: dict[str, Path], make: Make, tmp_path: Path
) -> None:
    first, second = make("a.patch", 1.0, ATTENTION), make("b.patch", 2.0, MLP)
    # The second patch alone sees that this is not its base.
    other = str(tmp_path / "b.patch-model")
    assert run(["stack", str(first), str(second), "--base", other, "-o", str(tmp_path / "out"), "-q"]) == 3
    assert run(["stack", str(first), str(second), "--base", str(checkpoints["gpt2"]), "-q"]) == 3
    assert run(["stack", str(first), "--base", str(base), "-q"]) == 2
    assert run(["stack", str(first), str(second), "--base", str(base), "--save", "adapter", "-q"]) == 2
    assert not (tmp_path / "out").exists()
