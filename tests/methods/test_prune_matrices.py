"""Pruning of single matrices: the worked numbers of the specifications, and slow references written anew here."""

from __future__ import annotations

import math
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery.compute import sparsegpt
from llmsurgery.compute.accumulate import SecondMoment
from llmsurgery.compute.inputs import SquareSum
from llmsurgery.compute.sparsegpt import Factor, factorise, prune_matrix
from llmsurgery.errors import DivergedError
from llmsurgery.methods.amounts import Amount
from llmsurgery.methods.group_scores import entry_terms, tensor_score
from llmsurgery.methods.heads_and_channels import channels_kept, groups_kept
from llmsurgery.methods.prune.d_pruner import block_mask, joined
from llmsurgery.methods.prune.shortgpt import influence
from llmsurgery.methods.prune.void import activity, voids
from llmsurgery.methods.prune.wanda import scores, variant_mask, wanda_mask
from llmsurgery.methods.pruning import magnitude_mask
from llmsurgery.train.importance import Importance, guarded_gradient

W = torch.tensor([[4, 1, -0.5, 2], [-1, 3, 0.1, -2]])
X = torch.tensor([[1.0, 0, 2, 0], [1, 1, 0, 0], [0, 1, 2, 2], [2, 0, 0, 2]])
HALF, TWO_OF_FOUR = Amount(0.5), Amount(0.5, (2, 4))


def error(pruned: torch.Tensor) -> float:
    return float(((W - pruned) @ X.T).square().sum())


def seen() -> tuple[SquareSum, SecondMoment]:
    squares, moment = SquareSum(4), SecondMoment(4)
    for part in X.split(3):
        squares.update(part)
        moment.update(part)
    return squares, moment


def test_magnitude() -> None:
    gone = magnitude_mask(W, HALF)
    assert gone.int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    # The released rule takes every entry up to the threshold at index 4 of the sorted ones.
    assert int((W.abs() <= W.abs().reshape(-1).sort().values[4]).sum()) == 6
    assert magnitude_mask(W, TWO_OF_FOUR).int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]


def test_wanda() -> None:
    found = scores(W, seen()[0], "w")
    wanted = [[9.7980, 1.4142, 1.4142, 5.6569], [2.4495, 4.2426, 0.2828, 5.6569]]
    assert found.tolist() == [pytest.approx(row, abs=1e-4) for row in wanted]
    for amount in (HALF, TWO_OF_FOUR):
        pruned = W.masked_fill(wanda_mask(found, amount), 0)
        assert pruned.tolist() == [[4, 0, 0, 2], [0, 3, 0, -2]]
    assert error(pruned) == pytest.approx(7.68, abs=1e-4)


def test_sparsegpt() -> None:
    moment = seen()[1]
    assert (2 * moment.sum).tolist() == [[12, 2, 4, 8], [2, 4, 4, 4], [4, 4, 16, 8], [8, 4, 8, 16]]
    factor = factorise(2 * moment.sum, 0.01, "w")
    diagonal = factor.upper.diagonal()
    assert diagonal.tolist() == pytest.approx([0.350292, 0.598331, 0.286890, 0.249068], abs=1e-5)
    caught: list[torch.Tensor] = []
    pruned = prune_matrix(W, factor, 0.5, observe=lambda _, score: caught.append(score.clone()))
    assert pruned[0].tolist() == pytest.approx([4, 0, 0, 2], abs=1e-5)
    assert pruned[1].tolist() == pytest.approx([0, 2.996438, 0, -2.445766], abs=1e-5)
    assert int((pruned == 0).sum()) == 4
    assert error(pruned) == pytest.approx(6.0608, abs=1e-3)
    # The general importance of D-Pruner: U_jj^2 and [H^-1]_jj agree in the first column alone.
    wanted = [[130.3947, 2.7933, 3.0374, 64.4800], [8.1497, 25.1397, 0.1215, 64.4800]]
    assert caught[0].tolist() == [pytest.approx(row, rel=1e-3) for row in wanted]
    inverse = factor.upper.square().sum(0).sqrt()
    assert inverse.tolist() == pytest.approx([0.350292, 0.598332, 0.303566, 0.349504], abs=1e-5)


def slow_sparsegpt(weight: torch.Tensor, moment: torch.Tensor, share: float, m: int, block: int) -> torch.Tensor:
    """Zero column by column and solve for the rest of each row anew, in fp64: what the factor stands for."""
    w = weight.double().clone()
    h = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    rows, width = w.shape
    gone = torch.zeros(rows, width, dtype=torch.bool)
    for j in range(width):
        size = m or block
        if j % size == 0:
            stop = min(j + size, width)
            cost = torch.stack([w[:, c] ** 2 / torch.linalg.inv(h[c:, c:])[0, 0] for c in range(j, stop)], 1)
            pools = [range(rows)] if not m else [[row] for row in range(rows)]
            for pool in pools:
                entries = sorted((float(cost[r, c]), r, c) for r in pool for c in range(stop - j))
                for _, r, c in entries[: math.floor(share * len(entries))]:
                    gone[r, j + c] = True
        inverse = torch.linalg.inv(h[j:, j:])
        for r in range(rows):
            if gone[r, j]:
                w[r, j:] -= w[r, j] / inverse[0, 0] * inverse[0]
                w[r, j] = 0
    return w


@pytest.mark.parametrize(("m", "block"), [(0, 8), (0, 5), (4, 8)])
def test_sparsegpt_is_the_slow_reference(m: int, block: int) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 16, generator=draw)
    inputs = torch.randn(40, 16, generator=draw) @ torch.randn(16, 16, generator=draw)
    moment = SecondMoment(16)
    moment.update(inputs)
    factor = factorise(moment.sum, 0.01, "w")
    pruned = prune_matrix(weight, factor, 0.5, (2, 4) if m else None, block)
    wanted = slow_sparsegpt(weight, moment.sum, 0.5, m, block)
    assert torch.equal(pruned == 0, wanted == 0)
    torch.testing.assert_close(pruned.double(), wanted, rtol=1e-3, atol=1e-4)


def by_columns(weight: torch.Tensor, factor: Factor, group: tuple[int, int] | None, block: int) -> torch.Tensor:
    """SparseGPT as it is written down, each column paying at once to all behind it."""
    w, u = weight.double(), factor.upper.double()
    gone = torch.zeros(w.shape, dtype=torch.bool)
    for j in range(w.shape[1]):
        size = group[1] if group else block
        if j % size == 0:
            ahead = slice(j, min(j + size, w.shape[1]))
            costs = w[:, ahead].square() / u.diagonal()[ahead].square()
            rows, count = (costs, group[0]) if group else (costs.reshape(1, -1), costs.numel() // 2)
            order = rows.argsort(dim=1, stable=True)[:, :count]
            gone[:, ahead] = torch.zeros(rows.shape, dtype=torch.bool).scatter(1, order, True).reshape(costs.shape)
        lost = torch.where(gone[:, j], w[:, j] / u[j, j], 0)
        w[:, j:] -= lost[:, None] * u[j, j:]
        w[:, j] = w[:, j].masked_fill(gone[:, j], 0)
    return w


@pytest.mark.parametrize("group", [None, (2, 4), (3, 10), (25, 50)])
def test_panels_of_columns_pay_as_single_columns_do(group: tuple[int, int] | None) -> None:
    draw = torch.Generator().manual_seed(4)
    inputs = torch.randn(400, 200, generator=draw) @ torch.randn(200, 200, generator=draw)
    factor = factorise(inputs.T @ inputs, 0.01, "w")
    # Stored the other way round, as GPT-2's matrices are.
    weight = torch.randn(200, 7, generator=draw).T
    pruned, wanted = prune_matrix(weight, factor, 0.5, group, 100), by_columns(weight, factor, group, 100)
    assert torch.equal(pruned == 0, wanted == 0)
    torch.testing.assert_close(pruned.double(), wanted, rtol=1e-3, atol=1e-4)


def test_the_kernel_waits_for_what_it_is_built_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    there: dict[str, Any] = {"gcc": "/usr/bin/gcc", "triton": object(), "headers": str(tmp_path)}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", there.get)
    monkeypatch.setattr(sparsegpt, "find_spec", there.get)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: there["headers"])
    monkeypatch.setattr(sysconfig, "get_paths", lambda _: {"include": str(tmp_path / "none")})
    found = []
    for missing in (None, "gcc", "triton", "headers"):
        with monkeypatch.context() as patch:
            if missing is not None:
                patch.setitem(there, missing, None)
            sparsegpt.can_compile.cache_clear()
            found.append(sparsegpt.can_compile())
    sparsegpt.can_compile.cache_clear()
    assert found == [True, False, False, False]


def test_a_block_of_columns_is_made_a_multiple_of_the_pattern() -> None:
    factor = Factor(torch.eye(12), torch.zeros(12, dtype=torch.bool), 0.01)
    pruned = prune_matrix(torch.arange(1.0, 25).reshape(2, 12), factor, 0.5, (2, 4), 6)
    assert ((pruned.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_dead_inputs_lose_their_column_and_singular_moments_are_damped_more() -> None:
    moment = torch.ones(4, 4)
    moment[2] = moment[:, 2] = 0
    factor = factorise(moment, 0.0, "w")
    assert factor.dead.tolist() == [False, False, True, False]
    assert factor.damping > 0
    assert (prune_matrix(W, factor, 0.5)[:, 2] == 0).all()
    with pytest.raises(DivergedError, match="singular") as caught:
        factorise(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 0.01, "model.layers.0.mlp.up_proj.weight")
    assert "model.layers.0.mlp.up_proj.weight" in caught.value.what
    assert caught.value.why
    assert caught.value.fix
    with pytest.raises(DivergedError, match="NaN or infinite"):
        factorise(torch.full((2, 2), torch.nan), 0.01, "w")


def test_the_variant_of_wanda_reaches_the_sparsity_of_the_matrix_with_rows_of_different_ones() -> None:
    draw = torch.Generator().manual_seed(5)
    score = torch.rand(32, 200, generator=draw) ** torch.linspace(0.5, 4, 32)[:, None]
    marked = variant_mask(score, 0.5)
    assert float(marked.float().mean()) == pytest.approx(0.5, abs=0.001)
    per_row = marked.sum(1)
    assert per_row.min() < per_row.max()
    for row in range(32):
        assert score[row][marked[row]].max() <= score[row][~marked[row]].min()


GRADIENTS = torch.tensor([[[0.2, 0.1, -0.4]], [[-0.1, 0.3, 0.2]]])


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("code", [0.303125, 0.095, 0.0597]),
        ("paper", [0.028125, 0.039, 0.0095]),
        ("obs", [0.021875, 0.041, 0.0105]),
        # |.1 + .0025| + |-.05 + .000625|, |-.02 + .0001| + |-.06 + .0009|, |-.04 + .0004| + |.02 + .0001|.
        ("taylor", [0.151875, 0.079, 0.0597]),
    ],
)
def test_importance_of_the_domain(form: str, wanted: list[float]) -> None:
    weight = torch.tensor([[0.5, -0.2, 0.1]])
    found = Importance(form, 2)
    for gradient in GRADIENTS:
        found.add(gradient, weight)
    assert found.value(weight)[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_refined_loss() -> None:
    general = torch.tensor([4.0])
    for g, odd, wanted in ((0.5, False, 0.50018), (-0.5, False, -0.49982), (-0.5, True, -0.50018)):
        found = guarded_gradient(torch.tensor([g]), general, 0.1, 0.03, 1, odd)
        assert float(found) == pytest.approx(wanted, abs=1e-7)
    assert float(guarded_gradient(torch.tensor([0.5]), general, 0.0, 0.03, 1, False)) == 0.5


def test_blocking_and_the_sum_of_scores() -> None:
    score = torch.tensor([[1.0, 2, 9, 8], [3, 4, 7, 6]])
    assert (~block_mask(score, HALF, 1)).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert (~block_mask(score, HALF, 2)).int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert block_mask(score, TWO_OF_FOUR, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert joined(score, score, 1.0).tolist() == (2 * score / score.mean()).tolist()
    # An expert that no token of the domain reached is ranked by the general importance alone.
    assert joined(torch.zeros(2, 4), score, 2.0).tolist() == (2 * score / score.mean()).tolist()


def test_scores_of_coupled_structures() -> None:
    weight = torch.tensor([[2, 1, -1, 0.5], [0.5, -2, 1, 1]])
    first = torch.tensor([[0.1, -0.2, 0.3, 0], [0.2, 0.1, 0, -0.1]])
    second = torch.tensor([[-0.1, 0.2, 0.1, 0.2], [0, 0.1, 0.2, 0.3]])

    def score(name: str, gradient: torch.Tensor, squared: torch.Tensor) -> list[float]:
        return tensor_score(name, entry_terms(name, weight, gradient, squared), 0, 2).tolist()

    assert score("vectorize", first, first.square()) == pytest.approx([0.3, 0.2], abs=1e-6)
    assert score("param_first", first, first.square()) == pytest.approx([0.7, 0.4], abs=1e-6)
    total, mean = first + second, (first.square() + second.square()) / 2
    assert score("param_first", total, mean) == pytest.approx([0.5, 0.9], abs=1e-6)
    assert score("param_second", total, mean) == pytest.approx([0.135, 0.115], abs=1e-6)
    assert score("param_mix", total, mean) == pytest.approx([0.5625, 0.8825], abs=1e-6)


def test_heads_divide_the_width_and_channels_are_round() -> None:
    # SmolLM2: 9 query heads, 3 of key and value, 576 wide.
    assert groups_kept(3, 3, 576, 0.25) == 2
    assert groups_kept(3, 3, 576, 0.6) == 1
    assert groups_kept(1, 4, 32, 0.25) == 1
    assert [channels_kept(1536, 0.25), channels_kept(64, 0.25), channels_kept(352, 0.01)] == [1152, 48, 344]


def test_block_influence() -> None:
    before, after = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 1], [0, 2]])
    assert float(influence(before, after).mean()) == pytest.approx(0.1464466, abs=1e-6)
    assert float(influence(before, after, angular=True).mean()) == pytest.approx(0.125, abs=1e-6)
    assert influence(before, 2 * before).tolist() == [0, 0]


def test_voids() -> None:
    norms = torch.tensor([[1.0], [5], [6], [8], [9], [15]])
    assert (~voids(norms, 0.8))[:, 0].int().tolist() == [1, 1, 0, 0, 1]
    assert activity(norms, 0.2).tolist() == [1, 1, 1, 1, 1]
    assert bool(voids(torch.tensor([[2.0], [1.0]]), 0.0)[0, 0])
