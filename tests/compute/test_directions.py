"""Directions of keys: those of the statistics, decomposed once, and read from the cache afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute import directions
from llmsurgery.compute.cache import StatisticsCache
from llmsurgery.compute.directions import Directions, key_directions
from llmsurgery.compute.load import load_model
from llmsurgery.compute.progress import Silent
from llmsurgery.compute.statistics import key_statistics
from llmsurgery.errors import InputError
from llmsurgery.run.encoding import make_encoder

from .test_statistics import CACHE, TEXTS
from .test_stream import CPU, structure


def found(root: Path, tokens: int, cache: StatisticsCache | None, strict: bool = False) -> dict[int, Directions]:
    encoder, model = make_encoder(Checkpoint.open(root)), load_model(root, torch.float32, CPU)
    return key_directions(model, structure(root), (1, 0), TEXTS, encoder, cache, tokens, Silent(), strict)


@pytest.mark.parametrize("tokens", [20, 100])
def test_directions_are_those_of_the_statistics(
    tokens: int, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSURGERY_CACHE", str(tmp_path))
    root = checkpoints["sharded_llama"]
    encoder, model = make_encoder(Checkpoint.open(root)), load_model(root, torch.float32, CPU)
    plain = key_statistics(model, structure(root), (1, 0), TEXTS, encoder, None, tokens, Silent())
    anew = found(root, tokens, CACHE)
    # A second run decomposes nothing and does not even read the keys.
    monkeypatch.setattr(directions, "key_statistics", None)
    kept = found(root, tokens, CACHE)
    assert list(kept) == [1, 0]
    for layer, statistics in plain.items():
        spectrum = statistics.spectrum()
        assert torch.allclose(kept[layer].spectrum(), spectrum)
        for tau in (float("inf"), float(spectrum[4]), 0.0):
            wide, basis = statistics.protected(tau), kept[layer].protected(tau)
            assert torch.equal(basis, anew[layer].protected(tau))
            assert basis.shape == wide.shape
            assert torch.allclose(basis @ basis.T, (wide @ wide.T).float(), atol=1e-5)


def test_without_a_cache_they_are_kept_in_memory(checkpoints: dict[str, Path]) -> None:
    of = found(checkpoints["sharded_llama"], 20, None)[1]
    basis = of.protected(0.0)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)


def test_too_few_tokens_are_refused_from_the_cache_too(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSURGERY_CACHE", str(tmp_path))
    found(checkpoints["sharded_llama"], 20, CACHE)
    with pytest.raises(InputError, match="20 tokens"):
        found(checkpoints["sharded_llama"], 20, CACHE, strict=True)
