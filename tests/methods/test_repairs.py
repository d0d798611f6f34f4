"""The other methods of recover-alignment: the worked numbers of their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmsurgery.methods.recover_alignment.antidote import top_of_rows
from llmsurgery.methods.recover_alignment.direction import orthonormal
from llmsurgery.methods.recover_alignment.resta import add_vector
from llmsurgery.methods.recover_alignment.safe_lora import cosine_of, project

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
