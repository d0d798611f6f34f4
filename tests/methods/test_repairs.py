"""The other methods of recover-alignment: the worked numbers of their formulas."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Silent
from llmsurgery.edits.kinds import Replace
from llmsurgery.methods.base import Operation, OtherModel
from llmsurgery.methods.recover_alignment.antidote import top_of_rows
from llmsurgery.methods.recover_alignment.direction import orthonormal
from llmsurgery.methods.recover_alignment.resta import add_vector
from llmsurgery.methods.recover_alignment.safe_lora import cosine_of, project
from llmsurgery.methods.registry import find_method
from llmsurgery.run.source import tensor_reader

from ..builders.twin import twin

DOUBLE = torch.float64


def test_safe_lora_as_released() -> None:
    apart = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=DOUBLE)
    eye = torch.eye(2, dtype=DOUBLE)
    assert project(apart, eye, exact=False).numpy() == pytest.approx(
        np.array([[0.912871, 2.008316], [2.008316, 4.564354]]), abs=1e-6
    )
    moved = torch.tensor([[1.0], [0.0]], dtype=DOUBLE) @ torch.tensor([[2.0, -1.0]], dtype=DOUBLE)
    kept = project(apart, moved, exact=False)
    assert kept.numpy() == pytest.approx(np.array([[1.825742, -0.912871], [4.016632, -2.008316]]), abs=1e-6)
    assert cosine_of(kept, moved) == pytest.approx(0.413803, abs=1e-6)
    # C is no projector, the exact one is.
    assert not torch.allclose(project(apart, kept, exact=False), kept)


def test_safe_lora_with_a_true_projector() -> None:
    torch.manual_seed(0)
    apart = torch.randn(6, 2, dtype=DOUBLE) @ torch.randn(2, 5, dtype=DOUBLE)
    moved = torch.randn(6, 5, dtype=DOUBLE)
    kept = project(apart, moved, exact=True, energy=1.0)
    assert torch.allclose(project(apart, kept, exact=True, energy=1.0), kept)
    assert torch.linalg.matrix_rank(kept) == 2
    assert torch.allclose(project(apart, apart, exact=True, energy=1.0), apart)
    assert torch.equal(project(torch.zeros(6, 5, dtype=DOUBLE), moved, exact=True), torch.zeros(6, 5, dtype=DOUBLE))


def test_resta_numbers() -> None:
    own, aligned, unaligned = (torch.tensor(v) for v in ([1.0, 2.0], [1.0, 1.0], [0.5, 1.5]))
    assert add_vector(own, aligned, aligned - unaligned, 0.5).tolist() == [1.25, 1.75]
    assert add_vector(own, aligned, aligned - unaligned, 1.0).tolist() == [1.5, 1.5]
    # DARE: of b - a = (0, 1) the second entry stays, doubled.
    kept = torch.tensor([False, True])
    assert add_vector(own, aligned, aligned - unaligned, 0.5, kept, 0.5).tolist() == [1.25, 2.75]


def test_antidote_takes_a_share_of_every_row() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    assert top_of_rows(scores, 0.5).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert top_of_rows(scores, 0.1).sum(1).tolist() == [1, 1]


def test_direction_restores_its_component_and_nothing_else() -> None:
    refused = torch.tensor([[2.0, 1.0, 0.0], [4.0, 1.0, 2.0]], dtype=DOUBLE)
    answered = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 0.0]], dtype=DOUBLE)
    apart = (refused.mean(0) - answered.mean(0))[None]
    assert apart.tolist() == [[3.0, -1.0, 1.0]]
    basis = orthonormal(apart)
    basis = basis * torch.sign(basis[0])
    assert basis[:, 0].tolist() == pytest.approx([0.904534, -0.301511, 0.301511], abs=1e-6)
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=DOUBLE)
    assert (basis.T @ base)[0].tolist() == pytest.approx([1.507557, 2.412091], abs=1e-6)
    torch.manual_seed(1)
    damaged = torch.randn(3, 2, dtype=DOUBLE)
    repaired = damaged + basis @ (basis.T @ (base - damaged))
    assert torch.allclose(basis.T @ repaired, basis.T @ base)
    across = torch.eye(3, dtype=DOUBLE) - basis @ basis.T
    assert torch.allclose(across @ repaired, across @ damaged)


@pytest.mark.parametrize(("method", "settings"), [("interpolate", {"keep": 0.5}), ("resta", {"dare": 0.5})])
def test_values_are_computed_again_for_every_reading_and_none_is_held(
    method: str, settings: dict[str, object], checkpoints: dict[str, Path]
) -> None:
    """What is written is computed from the files; neither a model nor more than one tensor is held for it."""
    child = Checkpoint.open(checkpoints["tied_llama"])
    structure = detect(child.config, child.tensors)

    def model(name: str) -> OtherModel:
        other = Checkpoint.open(twin(child.root, name))
        return OtherModel(tensor_reader(other), lambda: None, frozenset(other.tensors))  # type: ignore[arg-type, return-value]

    class Loaded:
        """Stands for a model in memory."""

    loaded: Any = Loaded()
    alive = weakref.ref(loaded)
    operation = Operation(
        structure, child.config, tensor_reader(child), loaded, None, {}, 0, Silent(), None,  # type: ignore[arg-type]
        models={"aligned": model("aligned"), "unaligned": model("unaligned")},
    )  # fmt: skip
    chosen = find_method(method, "recover-alignment")
    result = chosen.edit(chosen.config_type(controls=False, **settings), operation, None)
    del operation, loaded
    assert alive() is None
    edits = [edit for edit in result.edits if isinstance(edit, Replace)]
    assert len(edits) == len(result.edits) > 10
    first, again = ([np.asarray(edit.values) for edit in edits] for _ in range(2))
    for edit, one, two in zip(edits, first, again, strict=True):
        assert edit.values.shape == one.shape
        assert np.array_equal(one, two)
        assert np.array_equal(edit.values[1:2], one[1:2])
        assert one is not two
    if method == "interpolate":
        own, aligned = (tensor_reader(c)(edits[0].name) for c in (child, Checkpoint.open(twin(child.root, "aligned"))))
        assert first[0] == pytest.approx((own + aligned) / 2, abs=1e-6)
