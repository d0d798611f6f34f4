"""Perturbations of the residual stream: the ball, the tokens they touch, and what they do to the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmsurgery.compute.residual import read_entries
from llmsurgery.evaluate.robustness.perturbation import (
    find_perturbation,
    median_norms,
    perturbed,
    project,
    prompt_batches,
)

from ..attacks.benches import bench_of


def test_worked_projection() -> None:
    found = project(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.5)
    assert torch.allclose(found, torch.tensor([[0.9, 1.2], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.equal(project(found, 0.0), torch.zeros(3, 2))


def test_prompt_tokens_and_their_norms(checkpoints: dict[str, Path]) -> None:
    bench = bench_of(checkpoints["tied_llama"])
    batches = prompt_batches(bench, 0)
    assert sorted(row for one in batches for row in one.rows) == [0, 1, 2, 3]
    for one in batches:
        assert one.prompt.sum((1, 2)).tolist() == [bench.forget[row].answer_start for row in one.rows]
        assert not bool((one.prompt[..., 0].bool() & one.batch.label_mask).any())
    assert sum(len(one.rows) for one in prompt_batches(bench, 3)) == 3
    ((one,), row) = (prompt_batches(bench, 1), bench.forget[0])
    with torch.no_grad():
        states = read_entries(bench.model, bench.structure, one.batch.input_ids, one.batch.attention_mask)
    wanted = states[1][0, : row.answer_start].norm(dim=-1).median()
    assert median_norms(bench, [one], [1]) == {1: pytest.approx(float(wanted))}


@pytest.mark.parametrize("family", ["tied_llama", "gpt2", "gemma", "gemma2", "mixtral"])
def test_a_larger_ball_makes_answers_more_likely_and_nothing_stays(family: str, checkpoints: dict[str, Path]) -> None:
    bench = bench_of(checkpoints[family])
    (one, *_) = prompt_batches(bench, 0)
    plain = bench.score("token_prob", one.rows)
    means = [sum(plain.values())]
    for share in (1e-6, 0.2, 1.0):
        radii = {entry: share * norm for entry, norm in median_norms(bench, [one], [0, 1]).items()}
        deltas = find_perturbation(bench, one, radii, 6, 0.5)
        for entry, delta in deltas.items():
            norms = delta.norm(dim=-1)
            assert float(norms.max()) <= radii[entry] * 1.0001
            assert not bool((norms > 0)[one.prompt[..., 0] == 0].any())
            assert bool((norms > 0)[one.prompt[..., 0] > 0].all())
        with perturbed(bench, one, deltas):
            means.append(sum(bench.score("token_prob", one.rows).values()))
    assert means[0] == pytest.approx(means[1], rel=1e-3)
    assert means[1] < means[2] < means[3]
    assert bench.score("token_prob", one.rows) == plain
    assert all(parameter.grad is None for parameter in bench.model.parameters())
