"""The fallback of `direction`: a step along the refusal direction, stored as a bias."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsurgery import recover_alignment, verify
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Silent
from llmsurgery.edits.kinds import Add
from llmsurgery.errors import UnsupportedError
from llmsurgery.evaluate.intervals import Figure
from llmsurgery.methods.direction_step import step_matrix, stepping
from llmsurgery.methods.recover_alignment import direction

from ..builders.twin import twin
from ..conftest import write_recovery_files

QUICK = {"controls": False, "eval.refusal_tokens": 2, "eval.text_rows": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_recovery_files(tmp_path_factory.mktemp("recovery"))


@pytest.mark.parametrize("architecture", ["tied_llama", "gpt2"])
def test_a_step_is_stored_as_the_model_was_measured_with(
    architecture: str, checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    child = checkpoints[architecture]
    outcome = recover_alignment(
        child, method="direction", aligned=twin(child, "aligned"), **files, out=tmp_path / "out",
        settings={**QUICK, "step": 0.5, "block": 0},
    )  # fmt: skip
    manifest: Any = outcome.manifest
    record = manifest["operations"][0]["record"]
    assert record["step"]["length"] == 0.5
    assert verify(tmp_path / "out", base=child)["save"] == "full"
    # Nothing but biases of MLPs is new or different.
    assert all(name.endswith(".bias") for name in manifest["tensors"])
    ids = torch.arange(1, 25)[None]
    with torch.inference_mode():
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
        model = AutoModelForCausalLM.from_pretrained(child, dtype=torch.float32)
        checkpoint = Checkpoint.open(child)
        matrix = step_matrix(detect(checkpoint.config, checkpoint.tensors), 0)
        assert matrix is not None
        before = model(input_ids=ids).logits
        # The direction is not kept in the record; its length is, and the bias that was stored is along it.
        bias = _bias(tmp_path / "out", matrix.module) - _bias(child, matrix.module)
        assert float(bias.norm()) == pytest.approx(record["step"]["norm"], rel=0.02)
        with stepping(model, matrix, bias):
            stepped = model(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, before)
    assert float((stored - stepped).abs().max()) < 1e-3 * float(stepped.abs().max())
    assert float((stored - before).abs().max()) > 10 * float((stored - stepped).abs().max())


def _bias(root: Path, module: str) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).get_submodule(module)
    bias = getattr(loaded, "bias", None)
    return torch.zeros(1) if bias is None else bias.detach()


class Made:
    """Figures of a repair as they are wanted: all refuse from the third step on."""

    contrast = SimpleNamespace(differences=lambda: torch.tensor([[2.0, 0.0]]))
    figures_of_aligned: ClassVar = {"safety.refusal_rate": Figure(1.0, 4, None)}
    prompts = SimpleNamespace(task=[1])

    def __init__(self, harmless: float, task: float) -> None:
        self.harmless, self.task, self.steps = harmless, task, 0

    def quick(self, _model: object) -> dict[str, float]:
        return {"safety.refusal_rate": float(self.steps >= 3), "task.score": self.task if self.steps else 1.0}

    def overrefusals(self, _model: object) -> dict[str, float]:
        return {"safety.overrefusal_rate": self.harmless if self.steps else 0.0}


@pytest.mark.parametrize(
    ("cosine", "share", "harmless", "task", "steps", "length"),
    [
        (0.9, 0.4, 0.0, 1.0, 3, 0.3),
        # Another direction, or one that is intact: a step is of no use.
        (0.5, 0.4, 0.0, 1.0, 0, None),
        (0.9, 0.95, 0.0, 1.0, 0, None),
        # It would have harmless prompts refused, or cost the task.
        (0.9, 0.4, 0.2, 1.0, 6, None),
        (0.9, 0.4, 0.0, 0.5, 6, None),
    ],
)
def test_the_step_is_the_fallback_of_a_similar_and_weak_direction(
    cosine: float, share: float, harmless: float, task: float, steps: int, length: float | None,
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = Made(harmless, task)

    def counted(*_: object) -> nullcontext[None]:
        made.steps += 1
        return nullcontext()

    checkpoint = Checkpoint.open(checkpoints["tied_llama"])
    structure, progress = detect(checkpoint.config, checkpoint.tensors), Silent()
    model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"model_type": "llama"}))
    operation: Any = SimpleNamespace(structure=structure, recovery=made, progress=progress, model=model)
    monkeypatch.setattr("llmsurgery.methods.direction_step.stepping", counted)
    record = {"block": 0, "cosine": cosine, "gap_before": share}
    found = direction._step(direction.DirectionConfig(), operation, [], record)
    assert made.steps == steps
    if length is None:
        assert found is None
        assert len(progress.notices) == (1 if steps else 0)
    else:
        assert found is not None
        step: Any = found.record["step"]
        assert (step["length"], step["norm"]) == (length, pytest.approx(0.6))
        assert [row["length"] for row in step["tried"]] == [0.1, 0.2, 0.3]
        added = {edit.name: edit.values for edit in found.edits if isinstance(edit, Add)}
        moved = [values.tolist() for values in added.values() if values.any()]
        assert moved == [[pytest.approx(0.6), 0.0]]


def test_a_model_without_biases_in_its_mlps_is_told(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    child = checkpoints["mixtral"]
    with pytest.raises(UnsupportedError, match="no place for a step"):
        recover_alignment(
            child, method="direction", aligned=twin(child, "aligned"), **files, out=tmp_path / "out",
            settings={**QUICK, "step": 0.5},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
