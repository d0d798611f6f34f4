"""Sensitive directions against matrices of gradients that plain autograd gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmsurgery.train.sensitive import Gathered, gradient_columns, quadratic_forms, sensitive_directions

from .bench import Bench

DOUBLE = torch.float64


def ignore(steps: int = 1, note: str = "") -> None:
    del steps, note


def row_gradients(bench: Bench, module: str, transposed: bool) -> list[torch.Tensor]:
    """The gradient of every row's mean loss [outputs, inputs], float64."""
    weight = bench.model.get_submodule(module).weight
    weight.requires_grad_(True)
    found = []
    for row in bench.rows:
        ids = torch.tensor([row.ids])
        scores = bench.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        loss = -scores.gather(1, ids[0, 1:, None]).squeeze(1)[max(1, row.answer_start) - 1 :].mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        found.append((gradient.T if transposed else gradient).double())
    weight.requires_grad_(False)
    return found


@pytest.mark.parametrize(("architecture", "role"), [("sharded_llama", "mlp.down"), ("gpt2", "attn.qkv")])
def test_directions_and_forms_equal_those_of_autograd(
    architecture: str, role: str, checkpoints: dict[str, Path]
) -> None:
    bench = Bench(checkpoints[architecture])
    (target,) = bench.structure.select([role], [1])
    gradients = row_gradients(bench, target.module, target.transposed)
    outputs, inputs = gradients[0].shape
    for side, width in (("out", outputs), ("in", inputs)):
        parts = [g @ g.T if side == "out" else g.T @ g for g in gradients]
        whole = sum(parts[1:], parts[0])
        values, vectors = torch.linalg.eigh(whole)
        widths = {target.module: width}
        for micro_batch in (1, 3):
            found = sensitive_directions(bench.model, widths, bench.rows, bench.pad, micro_batch, 3, side, ignore)
            one = found[target.module]
            torch.testing.assert_close(one.values, values.flip(0)[:3], rtol=1e-3, atol=0)
            assert one.total == pytest.approx(float(whole.trace()), rel=1e-3)
            torch.testing.assert_close(one.basis.T @ one.basis, torch.eye(3, dtype=DOUBLE))
            # The same subspace: an eigenvector's sign is nobody's.
            cosines = (one.basis.T @ vectors.flip(1)[:, :3]).diagonal().abs()
            assert float(cosines.min()) > 0.999
    torch.manual_seed(0)
    second, first = torch.randn(outputs, 2, dtype=DOUBLE), torch.randn(2, inputs, dtype=DOUBLE)
    expected = sum(float((g * (second @ first)).sum()) ** 2 for g in gradients) / len(gradients)
    forms = quadratic_forms(bench.model, {target.module: [(second, first)]}, bench.rows, bench.pad, 2, ignore)
    assert forms[target.module][0] == pytest.approx(expected, rel=1e-3)
    assert not any(parameter.requires_grad for parameter in bench.model.parameters())


def test_columns_give_the_products_of_a_gradient() -> None:
    torch.manual_seed(0)
    for tokens in (3, 12):
        inputs, slopes = torch.randn(tokens, 7), torch.randn(tokens, 5)
        gradient = slopes.T @ inputs
        out, into = (gradient_columns(inputs, slopes, side) for side in ("out", "in"))
        torch.testing.assert_close(out @ out.T, gradient @ gradient.T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(into @ into.T, gradient.T @ gradient, atol=1e-4, rtol=1e-4)


def test_many_columns_are_merged_without_losing_the_strong_ones() -> None:
    torch.manual_seed(1)
    strong = torch.linalg.qr(torch.randn(40, 3))[0] * torch.tensor([30.0, 20.0, 10.0])
    gathered, whole = Gathered(8), torch.zeros(40, 40)
    for _ in range(30):
        columns = torch.cat([strong, 0.1 * torch.randn(40, 4)], dim=1)
        gathered.add(columns)
        whole += columns @ columns.T
    assert gathered.columns is not None
    assert gathered.columns.shape[1] <= 32
    found = gathered.leading(3)
    values, vectors = torch.linalg.eigh(whole)
    torch.testing.assert_close(found.values.float(), values.flip(0)[:3], rtol=1e-3, atol=0)
    assert float((found.basis.float().T @ vectors.flip(1)[:, :3]).diagonal().abs().min()) > 0.999
    assert found.total == pytest.approx(float(whole.trace()), rel=1e-5)
