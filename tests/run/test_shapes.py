"""Whole runs whose edits change which tensors there are, and the configuration that announces them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llmsurgery import apply, diff, redirect, revert, unlearn, verify
from llmsurgery.edits.kinds import Add, Config, Drop, Edit, Rename, Replace, Slice
from llmsurgery.errors import DamagedError, InputError, NoEffectError, UsageError
from llmsurgery.methods.base import MethodResult
from llmsurgery.run import operate, streamed
from llmsurgery.run.forms import changes_of
from llmsurgery.run.inspect import inspect_model

Operate = Callable[..., dict[str, Any]]


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch, data_files: dict[str, Path]) -> Operate:
    """Run an operation whose method returns the edits given."""

    def run(source: Path, out: Path, edits: Sequence[Edit], **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(operate, "train_until_it_fits", lambda *_: MethodResult(edits, {}))
        settings = {"max_steps": 1, "eval.generate": False}
        outcome = unlearn(
            source, method="flat", out=out, until="none", guard="none", settings=settings, **data_files, **options
        )
        return dict(outcome.manifest)

    return run


def tree(root: Path) -> dict[str, tuple[str, int]]:
    return {
        path.relative_to(root).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mode & 0o777)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def model_files(root: Path) -> dict[str, tuple[str, int]]:
    records = ("README.md", "surgery.json", ".llmsurgery/")
    return {name: file for name, file in tree(root).items() if not name.startswith(records)}


def stored(root: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def logits(root: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(1, 25)[None]).logits
    return found


def check(source: Path, out: Path, edits: Sequence[Edit], operation: Operate, tmp_path: Path) -> dict[str, Any]:
    """Everything that holds of a run, whatever its edits."""
    before = tree(source)
    manifest = operation(source, out, edits)
    assert tree(source) == before, "the source changed"
    named = {edit.name for edit in edits if not isinstance(edit, Config)}  # type: ignore[union-attr]
    old, new = stored(source), stored(out)
    for name in old.keys() - manifest["tensors"].keys():
        assert torch.equal(old[name], new[name]), name
    assert named <= manifest["tensors"].keys()
    for name, row in manifest["tensors"].items():
        assert (row["sha256_before"] is None) == (name not in old)
        assert (row["sha256_after"] is None) == (name not in new)
        assert name not in new or row["shape"] == list(new[name].shape)
    assert verify(out, base=source)["save"] == "full"
    revert(out, out=tmp_path / "reverted")
    assert tree(tmp_path / "reverted") == before
    shown: Any = diff(source, out, out=tmp_path / "patch")["patch"]
    assert shown["bytes"] < 20_000
    applied = apply(tmp_path / "patch", source, out=tmp_path / "applied")
    assert model_files(tmp_path / "applied") == model_files(out)
    rows = manifest["tensors"].items()
    changed = {name for name, row in rows if row["sha256_before"] != row["sha256_after"] or "source" in row}
    assert applied["tensors"] == {name: manifest["tensors"][name] for name in changed}
    revert(tmp_path / "applied", out=tmp_path / "reverted-too")
    assert tree(tmp_path / "reverted-too") == before
    small = operation(source, tmp_path / "small", edits, save="patch")
    assert small["tensors"] == manifest["tensors"]
    assert small["metrics"] == manifest["metrics"]
    apply(tmp_path / "small", source, out=tmp_path / "applied-too")
    assert model_files(tmp_path / "applied-too") == model_files(out)
    operation(source, tmp_path / "bare", edits, undo=False, link=True)
    assert model_files(tmp_path / "bare") == model_files(out)
    assert tree(source) == before, "the source changed"
    assert inspect_model(str(out))["parameters"] == sum(tensor.numel() for tensor in new.values())
    return manifest


def biases(width: int = 32, inner: int = 64) -> list[Edit]:
    edits: list[Edit] = []
    for layer in range(2):
        for part, size in (("gate", inner), ("up", inner), ("down", width)):
            values = np.arange(size) / size if (layer, part) == (1, "down") else np.zeros(size)
            edits.append(Add(f"model.layers.{layer}.mlp.{part}_proj.bias", values))
    return edits


@pytest.mark.parametrize("name", ["tied_llama", "sharded_llama"])
def test_biases_that_the_config_announces(
    name: str, checkpoints: dict[str, Path], operation: Operate, tmp_path: Path
) -> None:
    source, out = checkpoints[name], tmp_path / "out"
    manifest = check(source, out, [*biases(), Config(("config.json", "mlp_bias"), True)], operation, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.allclose(model.model.layers[1].mlp.down_proj.bias, torch.arange(32) / 32)
    assert (logits(out) - logits(source)).abs().max() > 0.01
    row = manifest["tensors"]["model.layers.0.mlp.up_proj.bias"]
    assert (row["dtype"], row["role"]) == ("BF16", "mlp.up.bias")
    old, new = ((root / "config.json").read_text() for root in (source, out))
    assert new == old.replace('"mlp_bias": false', '"mlp_bias": true')
    assert diff(source, out)["files"] == {"changed": ["config.json"], "added": [], "removed": []}


def test_biases_that_the_config_does_not_announce(
    checkpoints: dict[str, Path], operation: Operate, tmp_path: Path
) -> None:
    with pytest.raises(DamagedError, match=r"mlp\.down_proj\.bias") as caught:
        operation(checkpoints["tied_llama"], tmp_path / "out", biases())
    assert "does not announce" in caught.value.why
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_that_the_loader_drops_in_silence(
    checkpoints: dict[str, Path], operation: Operate, tmp_path: Path
) -> None:
    # Stock transformers reports neither name, because old checkpoints hold such buffers.
    for name, values in (("masked_bias", np.array(-1e4)), ("bias", np.ones((1, 1, 8, 8)))):
        with pytest.raises(DamagedError, match=rf"attn\.{name}") as caught:
            operation(checkpoints["gpt2"], tmp_path / "out", [Add(f"transformer.h.0.attn.{name}", values)])
        assert "dropped in silence" in caught.value.why
    assert not list(tmp_path.glob("out*"))


def test_a_head_of_its_own(checkpoints: dict[str, Path], operation: Operate, tmp_path: Path) -> None:
    head = Add("lm_head.weight", np.random.default_rng(0).integers(-9, 9, (262, 32)) / 8)
    edits = [head, Config(("config.json", "tie_word_embeddings"), False)]
    check(checkpoints["tied_llama"], tmp_path / "out", edits, operation, tmp_path)
    assert (logits(tmp_path / "out") - logits(checkpoints["tied_llama"])).abs().max() > 0.1


@pytest.mark.parametrize("name", ["tied_llama", "sharded_llama"])
def test_a_block_is_dropped(name: str, checkpoints: dict[str, Path], operation: Operate, tmp_path: Path) -> None:
    source, out = checkpoints[name], tmp_path / "out"
    blocks = [key for key in stored(source) if ".layers." in key]
    edits: list[Edit] = [Drop(key) for key in blocks if ".layers.0." in key]
    edits += [Rename(key, key.replace(".layers.1.", ".layers.0.")) for key in blocks if ".layers.1." in key]
    edits += [Config(("config.json", "num_hidden_layers"), 1)]
    manifest = check(source, out, edits, operation, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference.model.layers = reference.model.layers[1:]
    reference.model.layers[0].self_attn.layer_idx = 0
    reference.config.num_hidden_layers = 1
    with torch.inference_mode():
        expected = reference(input_ids=torch.arange(1, 25)[None]).logits
    assert torch.equal(logits(out), expected)
    row = manifest["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert row["source"] == "model.layers.1.mlp.up_proj.weight"
    assert {row["role"]: row["changed"] for row in manifest["coverage"]}["mlp.up"] == 2


def test_neurons_are_cut_out_of_transposed_matrices(
    checkpoints: dict[str, Path], operation: Operate, tmp_path: Path
) -> None:
    source, out = checkpoints["gpt2"], tmp_path / "out"
    keep = np.flatnonzero(np.random.default_rng(0).random(128) < 0.6)
    edits: list[Edit] = [Config(("config.json", "n_inner"), int(keep.size))]
    for layer in range(2):
        mlp = f"transformer.h.{layer}.mlp"
        edits += [Slice(f"{mlp}.c_fc.weight", 1, keep), Slice(f"{mlp}.c_fc.bias", 0, keep)]
        edits += [Slice(f"{mlp}.c_proj.weight", 0, keep)]
    manifest = check(source, out, edits, operation, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        for block in reference.transformer.h:
            gone = np.setdiff1d(np.arange(128), keep)
            block.mlp.c_proj.weight[gone] = 0
        expected = reference(input_ids=torch.arange(1, 25)[None]).logits
    assert torch.allclose(logits(out), expected, atol=1e-5)
    row = manifest["tensors"]["transformer.h.0.mlp.c_fc.weight"]
    assert (row["shape"], row["shape_before"]) == ([32, keep.size], [32, 128])


def test_values_of_the_config_alone(checkpoints: dict[str, Path], operation: Operate, tmp_path: Path) -> None:
    source, out = checkpoints["tied_llama"], tmp_path / "out"
    edits = [Config(("generation_config.json", "suppress_tokens"), [3, 4])]
    manifest = check(source, out, edits, operation, tmp_path)
    assert manifest["tensors"] == {}
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == [3, 4]
    same = [Config(("config.json", "mlp_bias"), False)]
    with pytest.raises(NoEffectError):
        operation(source, tmp_path / "same", same)
    with pytest.raises(UsageError, match="no adapter"):
        operation(source, tmp_path / "adapter", edits, save="adapter")


def test_a_config_that_is_not_loadable_leaves_nothing(
    checkpoints: dict[str, Path], operation: Operate, tmp_path: Path
) -> None:
    edits = [Slice("model.layers.0.mlp.up_proj.weight", 0, np.arange(32))]
    with pytest.raises(DamagedError, match="mismatched"):
        operation(checkpoints["tied_llama"], tmp_path / "out", edits)
    with pytest.raises(InputError, match=r"config\.json"):
        operation(checkpoints["tied_llama"], tmp_path / "out", [Config(("config.json", "hidden_size"), "wide")])
    assert not list(tmp_path.glob("out*"))


def test_verify_finds_what_is_back_or_gone(checkpoints: dict[str, Path], operation: Operate, tmp_path: Path) -> None:
    source, out = checkpoints["tied_llama"], tmp_path / "out"
    norm = Replace("model.norm.weight", np.ones(32) * 1.5)
    operation(source, out, [*biases(), norm, Config(("config.json", "mlp_bias"), True)])
    for base, message in ((out, "not in the base"), (checkpoints["sharded_llama"], "in one of them only")):
        with pytest.raises(DamagedError, match="does not follow") as caught:
            verify(out, base=base)
        assert message in caught.value.why


def test_a_streamed_result_is_checked_and_measured(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, announced = checkpoints["sharded_llama"], Config(("config.json", "mlp_bias"), True)

    def run(out: Path, edits: list[Edit]) -> dict[str, Any]:
        monkeypatch.setattr(streamed, "changes_of", lambda base, _: changes_of(base, MethodResult(edits, {})))
        settings = {"layers": "1", "stats_tokens": 400, "eval.figures": "edit"}
        outcome = redirect(source, method="rocr", source="bees", target="bread", out=out, settings=settings)
        return dict(outcome.manifest)

    moved = [edit for edit in biases() if ".1." in edit.name or "up" in edit.name]  # type: ignore[union-attr]
    for edits in (biases(), [*moved, announced]):
        with pytest.raises(DamagedError, match="bias"):
            run(tmp_path / "out", edits)
    assert not list(tmp_path.glob("out*"))
    # A bias behind the down projection is part of what it writes.
    figures = run(tmp_path / "out", [*biases(), announced])["metrics"]["redirect.residual"]
    assert figures["before"]["value"] != figures["after"]["value"]
