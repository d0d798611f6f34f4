"""restore: the worked numbers of its rules, and what holds of every result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmsurgery import recover_alignment
from llmsurgery.arch.spec import RoleTensor
from llmsurgery.compute.largest import Largest, keep_largest
from llmsurgery.errors import GateError, NoEffectError
from llmsurgery.evaluate.recovery import Recovery
from llmsurgery.methods.base import OtherModel
from llmsurgery.methods.restoring import Packed, Restoration, direction_loss, may_restore

from ..builders.saving import SIZES, save
from ..conftest import write_recovery_files

OWN = [0.30, -0.20, 0.50, 0.10, -0.40, 0.0]
ALIGNED = [0.10, -0.50, 0.50, 0.40, -0.10, 0.05]
GRADIENT = [0.8, 0.3, 0.9, 0.2, -0.6, -0.05]
TASK_GRADIENT = [-0.5, 0.0, 0.1, 0.0, 0.2, 0.3]


def test_candidates_of_the_worked_example() -> None:
    found = may_restore(torch.tensor(OWN), torch.tensor(ALIGNED), torch.tensor(GRADIENT))
    assert found.tolist() == [True, True, False, False, True, True]
    whatever = may_restore(torch.tensor(OWN), torch.tensor(ALIGNED), torch.tensor(GRADIENT), sign_rule=False)
    assert whatever.tolist() == [True, True, False, True, True, True]


def example() -> Restoration:
    """The worked example as a model of one tensor."""
    model = torch.nn.Module()
    model.m = torch.nn.Linear(1, 1)
    model.m.weight = torch.nn.Parameter(torch.tensor(OWN))
    target = RoleTensor("mlp.up", 0, "weight", "m", "m.weight", (6,), "F32", False)
    aligned = OtherModel(lambda name: np.array(ALIGNED, dtype=np.float32), lambda: pytest.fail("not loaded"))
    operation: Any = SimpleNamespace(
        model=model, models={"aligned": aligned}, read=lambda name: np.array(OWN, dtype=np.float32)
    )
    return Restoration(operation, [target], 0)


def test_a_step_and_its_rollback_take_exactly_as_many_as_they_should() -> None:
    restoration = example()
    weight: Any = restoration.operation.model.m.weight
    restoration.gradients[id(weight)] = torch.tensor(GRADIENT)
    chosen = restoration.restore(2)
    assert {number: places.tolist() for number, places in chosen.items()} == {0: [0, 4]}
    assert torch.equal(weight.detach(), torch.tensor([0.10, -0.20, 0.50, 0.10, -0.10, 0.0]))
    restoration.gradients[id(weight)] = torch.tensor(TASK_GRADIENT)
    assert restoration.roll_back(chosen, 0.2) == 1
    assert torch.equal(weight.detach(), torch.tensor([0.30, -0.20, 0.50, 0.10, -0.10, 0.0]))
    assert restoration.restored[0].tolist() == [False, False, False, False, True, False]
    # What went back may be chosen again; what is restored already may not.
    restoration.gradients[id(weight)] = torch.tensor(GRADIENT)
    assert {number: places.tolist() for number, places in restoration.restore(9).items()} == {0: [0, 1, 5]}
    kept = Packed.of(restoration.restored)
    restoration.show([torch.zeros(6, dtype=torch.bool)])
    assert torch.equal(weight.detach(), torch.tensor(OWN))
    restoration.show(kept.unpacked())
    assert torch.equal(weight.detach(), torch.tensor([0.10, -0.50, 0.50, 0.10, -0.10, 0.05]))


def test_the_largest_of_several_tensors_are_those_of_all_of_them_and_ties_go_by_place() -> None:
    assert keep_largest(torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]
    assert keep_largest(torch.tensor([1.0, 3.0]), 5).tolist() == [0, 1]
    assert keep_largest(torch.tensor([1.0]), 0).tolist() == []
    torch.manual_seed(0)
    pieces = [torch.randint(0, 9, (40,)).float() for _ in range(5)]
    largest = Largest(30)
    for number, piece in enumerate(pieces):
        largest.add(number, piece, torch.arange(40))
    order = torch.cat(pieces).argsort(descending=True, stable=True)[:30].sort().values.tolist()
    found = [40 * number + int(place) for number in range(5) for place in largest.of(number)]
    assert found == order


def test_loss_and_its_slope() -> None:
    state = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = direction_loss(state, torch.tensor([0.5, 0.5]))
    loss.backward()
    assert loss.item() == pytest.approx(-0.707107, abs=1e-6)
    assert state.grad is not None
    assert state.grad[0].tolist() == pytest.approx([0.0, -0.707107], abs=1e-6)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A child of six blocks, and a parent that differs in the first four alone, norms left out; with data."""
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(3)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 24})
    save(LlamaForCausalLM(config), root / "child", torch.bfloat16)
    save(LlamaForCausalLM(config), root / "aligned", torch.bfloat16)
    tensors = load_file(root / "child" / "model.safetensors")
    moved = {}
    for name, values in tensors.items():
        inside = any(f"layers.{number}." in name for number in range(4)) and "norm" not in name
        moved[name] = values + (0.1 * torch.randn(values.shape)).to(values.dtype) if inside else values
    save_file(moved, root / "aligned" / "model.safetensors", metadata={"format": "pt"})
    write_recovery_files(root)
    return root


def run(pair: Path, out: Path, settings: dict[str, object], **options: Any) -> Any:
    quick = {"controls": False, "eval.refusal_tokens": 2, "eval.generate": False, "eval.text_rows": 1}
    given = {"harmful": pair / "harmful.jsonl", "task": pair / "task.jsonl", **options}
    return recover_alignment(
        pair / "child", aligned=pair / "aligned", out=out, settings={**quick, **settings}, dtype="float32", **given
    )


def tensors(root: Path) -> dict[str, torch.Tensor]:
    with safe_open(root / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def scored(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the search see these scores, the last again and again; figures are what they are."""
    original, left = Recovery.task_scores, list(values)

    def scores(self: Recovery, model: Any, rows: Any = None, progress: Any = None) -> list[float]:
        if rows is None:
            return original(self, model, rows, progress)
        return [left.pop(0) if len(left) > 1 else left[0]]

    monkeypatch.setattr(Recovery, "task_scores", scores)


SHORT: dict[str, object] = {"steps": 4, "save_every": 2, "warm_up": 2, "rate": 0.01, "rollback": 0.5}


@pytest.mark.parametrize("rollback", [False, True])
def test_every_entry_is_the_aligned_models_or_the_childs(
    pair: Path, tmp_path: Path, rollback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The score at the start, after the warm-up, and of each state.
    scored(monkeypatch, [1.0, 0.1 if rollback else 0.96, 1.0])
    outcome = run(pair, tmp_path / "out", SHORT)
    child, aligned, result = (tensors(root) for root in (pair / "child", pair / "aligned", tmp_path / "out"))
    record = outcome.manifest["operations"][0]["record"]
    changed = 0
    for name, values in result.items():
        bits = values.view(torch.int16)
        own, other = child[name].view(torch.int16), aligned[name].view(torch.int16)
        assert bool(((bits == own) | (bits == other)).all()), name
        moved = int((bits != own).sum())
        assert moved == record["restored"].get(name, 0)
        if "norm" in name or not any(f"layers.{number}." in name for number in range(4)):
            assert moved == 0
        changed += moved
    count = record["entries_per_step"]
    blocks = sum(values.numel() for name, values in child.items() if "layers." in name)
    assert count == -(-blocks // 100)
    assert 0 < changed <= 4 * count
    assert record["mode"] == ("rollback" if rollback else "plain")
    assert all(("given_back" in step) == rollback for step in record["steps"])
    assert record["chosen_step"] == 4
    losses = [step["loss"] for step in record["steps"]]
    assert losses[-1] < losses[0]
    # The parent's identity, and no word of a prompt.
    assert set(outcome.manifest["models"]["aligned"]) == {"path", "config_sha256", "weights_sha256"}
    for file in ("surgery.json", "README.md"):
        assert "purple" not in (tmp_path / "out" / file).read_text()


def test_the_last_state_that_keeps_the_task_is_taken_and_without_one_there_is_no_result(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, [1.0, 1.0, 0.95, 0.94])
    record = run(pair, tmp_path / "out", SHORT).manifest["operations"][0]["record"]
    assert record["chosen_step"] == 2
    assert record["scores"] == {"2": 0.95, "4": 0.94}
    scored(monkeypatch, [1.0, 1.0, 0.94])
    with pytest.raises(GateError, match="below its floor") as caught:
        run(pair, tmp_path / "none", SHORT)
    assert caught.value.exit_code == 6
    assert not list(tmp_path.glob("none*"))


def test_all_entries_without_the_sign_rule_give_the_aligned_models_states(pair: Path, tmp_path: Path) -> None:
    run(pair, tmp_path / "out", {"steps": 1, "save_every": 1, "rate": 1.0, "sign_rule": False, "drop": 1.0})
    ids = AutoTokenizer.from_pretrained(pair / "child")("purple", return_tensors="pt")["input_ids"]
    found = []
    for root in (pair / "aligned", tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        with torch.no_grad():
            found.append(model(ids, output_hidden_states=True).hidden_states[4])
    assert torch.equal(*found)


def test_an_aligned_model_that_is_the_source_is_no_effect(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(NoEffectError, match="equals the aligned model") as caught:
        recover_alignment(pair / "child", aligned=pair / "child", harmful=pair / "harmful.jsonl", out=tmp_path / "out")
    assert caught.value.exit_code == 5
