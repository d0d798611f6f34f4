"""What every method must do on every architecture: plan, effect, coverage, exact bytes, reload, seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsurgery import apply, diff, revert, unlearn
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.edits.kinds import Edit, LowRank, Replace
from llmsurgery.methods.registry import all_methods
from llmsurgery.run import forms

from ..builders import BUILDERS

METHODS = [method.spec.name for method in all_methods()]
FAST = {"max_steps": 3, "lr": 0.01, "eval.generate": False}


def run(checkpoint: Path, method: str, out: Path, data: dict[str, Path], **settings: object) -> dict[str, Any]:
    outcome = unlearn(checkpoint, method=method, out=out, until="none", settings={**FAST, **settings}, **data)
    return dict(outcome.manifest)


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def checkpoint_files(root: Path) -> dict[str, str]:
    """The files that make the model: no card, manifest or undo data."""
    return {
        name: digest
        for name, digest in tree(root).items()
        if name not in {"README.md", "surgery.json"} and not name.startswith(".llmsurgery/")
    }


def stored(root: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = file.get_tensor(name)
    return tensors


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Reference rounding: the nearest of the two neighbours in the stored dtype, ties to the even one."""
    exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    guess = exact.to(dtype)
    step_up = torch.nextafter(guess, torch.full_like(guess, torch.inf))
    step_down = torch.nextafter(guess, torch.full_like(guess, -torch.inf))
    best = guess
    for candidate in (step_down, step_up):
        error, best_error = (candidate.double() - exact).abs(), (best.double() - exact).abs()
        width = {torch.float32: torch.int32}.get(dtype, torch.int16)
        even = (candidate.view(width) & 1) == 0
        best = torch.where((error < best_error) | ((error == best_error) & even), candidate, best)
    return best


@pytest.mark.parametrize("architecture", BUILDERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train", ["lora", "full"])
def test_method_writes_exactly_its_edits(
    method: str,
    architecture: str,
    train: str,
    checkpoints: dict[str, Path],
    data_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoints[architecture]
    before = tree(source)
    kept: list[Edit] = []
    original = forms.write_edits

    def record(checkpoint: Any, publication: Any, edits: Any, *more: Any) -> Any:
        kept.extend(edits)
        return original(checkpoint, publication, edits, *more)

    monkeypatch.setattr(forms, "write_edits", record)
    manifest = run(
        source, method, tmp_path / "out", data_files, train=train, roles="linear" if train == "lora" else "all"
    )

    assert tree(source) == before, "the source changed"
    # Coverage: every planned tensor was edited, and something moved.
    assert all(row["targeted"] == row["matched"] for row in manifest["coverage"])
    assert sum(row["changed"] for row in manifest["coverage"]) > 0
    # Exact bytes: base plus edit, rounded once; everything else untouched.
    old, new = stored(source), stored(tmp_path / "out")
    assert list(old) == list(new)
    edits = {edit.name: edit for edit in kept}
    assert set(edits) == set(manifest["tensors"])
    for name, tensor in old.items():
        edit = edits.get(name)
        if isinstance(edit, LowRank):
            expected = rounded(tensor.double().numpy() + edit.u @ edit.v, tensor.dtype)
        elif isinstance(edit, Replace):
            expected = rounded(edit.values, tensor.dtype)
        else:
            expected = tensor
        assert new[name].dtype == tensor.dtype
        assert torch.equal(new[name], expected), name
    # Hashes in the manifest are those of the bytes on disk.
    written = Checkpoint.open(tmp_path / "out")
    for name, row in manifest["tensors"].items():
        assert hashlib.sha256(written.read(name).tobytes()).hexdigest() == row["sha256_after"]
    # A patch leads to the same bytes, and undo data lead back to the source's.
    diff(source, tmp_path / "out", out=tmp_path / "patch")
    apply(tmp_path / "patch", source, out=tmp_path / "applied")
    revert(tmp_path / "out", out=tmp_path / "reverted")
    assert checkpoint_files(tmp_path / "applied") == checkpoint_files(tmp_path / "out")
    assert tree(tmp_path / "reverted") == before
    # Side files are carried over as they were.
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("architecture", BUILDERS)
@pytest.mark.parametrize("method", METHODS)
def test_result_reloads_with_the_logits_of_base_plus_edits(
    method: str, architecture: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints[architecture]
    run(source, method, tmp_path / "out", data_files)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = reference.state_dict()
    written = Checkpoint.open(tmp_path / "out")
    for name in written.tensors:
        key = name if name in state else f"transformer.{name}"
        state[key].copy_(torch.from_numpy(decode(written.read(name), written.info(name).dtype)))
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(1, 25)[None]
    with torch.inference_mode():
        assert torch.equal(reloaded(input_ids=ids).logits, reference(input_ids=ids).logits)
        source_logits = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(input_ids=ids).logits
        assert not torch.equal(reloaded(input_ids=ids).logits, source_logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("architecture", BUILDERS)
@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_one_result(
    method: str, architecture: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints[architecture]
    manifests = [run(source, method, tmp_path / name, data_files) for name in ("one", "two")]
    trees = [tree(tmp_path / name) for name in ("one", "two")]
    for files in trees:
        del files["surgery.json"]
    assert trees[0] == trees[1]
    for manifest in manifests:
        del manifest["cost"], manifest["out"]
    assert json.dumps(manifests[0]) == json.dumps(manifests[1])
    other = unlearn(source, method=method, out=tmp_path / "three", seed=1, until="none", settings=FAST, **data_files)
    assert other.manifest["tensors"] != manifests[0]["tensors"]


@pytest.mark.parametrize("architecture", BUILDERS)
@pytest.mark.parametrize("method", METHODS)
def test_dry_run_plans_what_the_run_does(
    method: str, architecture: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints[architecture]
    outcome = unlearn(source, method=method, out=tmp_path / "out", dry_run=True, **data_files)
    assert outcome.out is None
    assert not (tmp_path / "out").exists()
    manifest = run(source, method, tmp_path / "out", data_files)
    targets: Any = outcome.manifest["targets"]
    assert {row["role"]: row["targeted"] for row in manifest["coverage"]} == {
        role: row["tensors"] for role, row in targets.items()
    }
    sizes = [Checkpoint.open(source).info(name).nbytes for name in manifest["tensors"]]
    assert outcome.manifest["bytes_to_rewrite"] == sum(sizes)


@pytest.mark.parametrize("architecture", BUILDERS)
@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_untargeted_roles_alone(
    method: str, architecture: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints[architecture]
    manifest = run(source, method, tmp_path / "out", data_files, roles="mlp.down", layers="1")
    old, new = stored(source), stored(tmp_path / "out")
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed == list(manifest["tensors"])
    assert len(changed) == 1
