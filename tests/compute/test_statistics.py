"""Statistics of keys: against plain sums, by both routes, merged, cached, and honest about too few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery.arch.neurons import key_tensors
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.cache import StatisticsCache
from llmsurgery.compute.load import load_model
from llmsurgery.compute.progress import Silent
from llmsurgery.compute.statistics import KeyStatistics, key_statistics
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.errors import DivergedError, InputError, UnsupportedError, UsageError
from llmsurgery.run.encoding import make_encoder

from ..builders import BUILDERS
from .test_stream import CPU, opened, structure

TEXTS = ["The river runs past the mill and the old bridge.", "Bread is baked at dawn.", "Tam barks at the ferry. " * 30]
CACHE = StatisticsCache("weights", "cpu", "torch.float32")


def statistics(
    model: Any, root: Path, layers: tuple[int, ...], tokens: int, cache: StatisticsCache | None = None, **options: Any
) -> dict[int, KeyStatistics]:
    encoder = make_encoder(Checkpoint.open(root))
    progress = options.pop("progress", Silent())
    return key_statistics(model, structure(root), layers, TEXTS, encoder, cache, tokens, progress, **options)


def plain_keys(root: Path, layer: int, tokens: int) -> torch.Tensor:
    """The keys of the first tokens, text by text and without any padding."""
    model = load_model(root, torch.float32, CPU)
    encoder = make_encoder(Checkpoint.open(root))
    (target,) = [tensor for tensor in key_tensors(structure(root)) if tensor.layer == layer]
    found: list[torch.Tensor] = []
    handle = model.get_submodule(target.module).register_forward_pre_hook(
        lambda _module, inputs: found.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    for text in TEXTS:
        ids = encoder.encode_text(text, 256).ids[: tokens - sum(map(len, found))]
        if ids:
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]))
    handle.remove()
    return torch.cat(found)


def random_keys(tokens: int, size: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.5, -2, size)
    return torch.randn(tokens, size, generator=draw) * scale


def as_moment(keys: torch.Tensor) -> KeyStatistics:
    """The statistics of keys by way of the full matrix, however few they are."""
    second = (keys.double().mT @ keys.double() / len(keys)).float()
    return KeyStatistics(3, keys.shape[1], len(keys), second=second)


@pytest.mark.parametrize("architecture", [name for name in BUILDERS if name not in {"mixtral", "qwen3_moe", "olmoe"}])
def test_every_architecture_gives_the_plain_sum_loaded_and_streamed(
    architecture: str, checkpoints: dict[str, Path]
) -> None:
    root = checkpoints[architecture]
    plain = plain_keys(root, 1, 200)
    wanted = plain.double().mT @ plain.double() / 200
    loaded = statistics(load_model(root, torch.float32, CPU), root, (1,), 200)[1]
    streamed = statistics(opened(root), root, (1,), 200)[1]
    assert (loaded.layer, loaded.size, loaded.tokens) == (1, plain.shape[1], 200)
    torch.testing.assert_close(loaded.moment().double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(streamed.moment(), loaded.moment())


def test_few_tokens_keep_the_keys_and_many_their_moment(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["tied_llama"], torch.float32, CPU)
    few, many = (statistics(model, checkpoints["tied_llama"], (0, 1), count) for count in (40, 100))
    assert list(few) == [0, 1]
    assert few[0].keys is not None
    assert few[0].keys.shape == (40, 64)
    assert many[0].keys is None
    wanted = plain_keys(checkpoints["tied_llama"], 0, 40)
    torch.testing.assert_close(few[0].moment(), wanted.mT @ wanted / 40, rtol=1e-4, atol=1e-6)


def test_layers_behind_the_last_one_are_not_read(checkpoints: dict[str, Path]) -> None:
    streamed = opened(checkpoints["sharded_llama"])
    statistics(streamed, checkpoints["sharded_llama"], (0,), 100)
    assert streamed.blocks_read == 1


def test_thin_and_full_route_agree() -> None:
    keys = random_keys(30, 50)
    thin, full = KeyStatistics.of_keys(3, keys), as_moment(keys)
    assert thin.keys is not None
    right = random_keys(50, 4, seed=1)
    for ridge in (1.0, 1e-3):
        dense = keys.double().mT @ keys.double() / 30
        dense.diagonal().add_(ridge * dense.diagonal().mean())
        wanted = torch.linalg.solve(dense, right.double())
        torch.testing.assert_close(thin.solve(right, ridge), wanted, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(full.solve(right, ridge), wanted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(thin.solve(right[:, 0], ridge), wanted[:, 0])
    for tau in (1e-4, 0.02, 0.5):
        one, other = thin.protected(tau), full.protected(tau)
        assert one.shape == other.shape
        assert 0 < one.shape[1] <= 30
        torch.testing.assert_close(one.mT @ one, torch.eye(one.shape[1], dtype=torch.float64))
        torch.testing.assert_close(one @ one.mT, other @ other.mT, rtol=0, atol=1e-3)
    torch.testing.assert_close(thin.spectrum(), full.spectrum()[:30], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(thin.moment(), full.moment())


def test_protected_directions_are_those_the_threshold_names() -> None:
    # C = diag(.5, .5, 0, 0), the worked example of ROCR: P = diag(0, 0, 1, 1), once by keys and once by the moment.
    for copies in (1, 4):
        found = KeyStatistics.of_keys(0, torch.eye(4)[:2].repeat(copies, 1))
        assert (found.keys is None) == (copies == 4)
        basis = found.protected(0.02)
        torch.testing.assert_close(basis @ basis.mT, torch.diag(torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)))
        assert found.protected(0.6).shape == (4, 0)
        assert found.spectrum().tolist() == pytest.approx([0.5, 0.5])
    # With tau = 0 every key that was seen is protected, to the last digits.
    keys = random_keys(30, 50)
    basis = KeyStatistics.of_keys(0, keys).protected(0.0)
    assert basis.shape == (50, 30)
    rest = keys.double() - (keys.double() @ basis) @ basis.mT
    assert float(rest.norm(dim=1).max() / keys.double().norm(dim=1).min()) < 1e-10


@pytest.mark.parametrize("parts", [(10, 15), (10, 60), (60, 10), (60, 70)])
def test_merged_statistics_are_those_of_all_keys(parts: tuple[int, int]) -> None:
    keys = random_keys(sum(parts), 50)
    first, second = (KeyStatistics.of_keys(2, part) for part in keys.split(parts))
    merged, whole = first.merge(second), KeyStatistics.of_keys(2, keys)
    assert (merged.tokens, merged.layer, merged.size) == (sum(parts), 2, 50)
    assert (merged.keys is None) == (whole.keys is None)
    torch.testing.assert_close(merged.moment(), whole.moment())


def test_singular_systems_are_refused() -> None:
    keys = random_keys(30, 50)
    for found in (KeyStatistics.of_keys(3, keys), KeyStatistics.of_keys(3, torch.eye(50)[:40].repeat(3, 1))):
        with pytest.raises(UsageError, match="layer 3 has no inverse") as caught:
            found.solve(torch.ones(50), 0.0)
        assert caught.value.exit_code == 2
    # Without a ridge a full moment is solved as it is.
    full = KeyStatistics.of_keys(3, random_keys(500, 50))
    solved = full.solve(torch.ones(50), 0.0)
    torch.testing.assert_close(full.moment().double() @ solved, torch.ones(50, dtype=torch.float64))


def test_second_run_reads_the_cache(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSURGERY_CACHE", str(tmp_path))
    root = checkpoints["tied_llama"]
    for count in (40, 100):
        first = statistics(opened(root), root, (0, 1), count, CACHE)
        streamed = opened(root)
        again = statistics(streamed, root, (0, 1), count, CACHE)
        assert streamed.blocks_read == 0
        for layer in (0, 1):
            assert torch.equal(first[layer].moment(), again[layer].moment())
            assert again[layer].tokens == count
    # Other data, tokens or weights are other statistics; a layer that is missing is computed alone.
    for layers, count, cache in (
        ((0,), 41, CACHE),
        ((0,), 40, StatisticsCache("others", "cpu", "torch.float32")),
    ):
        streamed = opened(root)
        statistics(streamed, root, layers, count, cache)
        assert streamed.blocks_read == 1


def test_few_tokens_are_told_and_refused_only_when_strict(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["tied_llama"]
    model = load_model(root, torch.float32, CPU)
    progress = Silent()
    found = statistics(model, root, (0,), 100, progress=progress)[0]
    assert not found.enough
    assert "100 tokens for keys of 64 dimensions, 1.6 per dimension" in progress.notices[0]
    assert "raise the number of tokens to 320" in progress.notices[0]
    with pytest.raises(InputError, match=r"1\.6 per dimension") as caught:
        statistics(model, root, (0,), 100, strict=True)
    assert caught.value.exit_code == 3
    progress = Silent()
    found = statistics(model, root, (0,), 10**6, strict=True, progress=progress)[0]
    assert found.enough
    assert found.tokens < 10**6
    assert progress.notices == []


def test_bad_requests_are_named(checkpoints: dict[str, Path]) -> None:
    root = checkpoints["tied_llama"]
    model = load_model(root, torch.float32, CPU)
    with pytest.raises(UsageError, match="layer 2 does not exist"):
        statistics(model, root, (2,), 100)
    with pytest.raises(UsageError, match="0 tokens"):
        statistics(model, root, (0,), 0)
    moe = checkpoints["mixtral"]
    with pytest.raises(UnsupportedError, match="no dense MLP"):
        statistics(opened(moe), moe, (0,), 100)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.fill_(torch.inf)
    with pytest.raises(DivergedError, match="keys of layer 0"):
        statistics(model, root, (0,), 100)


def test_streamed_statistics_run_in_windows(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkpoints["tied_llama"]
    monkeypatch.setattr("llmsurgery.compute.statistics.BATCH_TOKENS", 64)
    monkeypatch.setattr(StreamedModel, "windows", lambda self, tokens: [slice(0, 1), slice(1, len(tokens))])
    streamed = opened(root)
    found = statistics(streamed, root, (0, 1), 200)
    assert streamed.blocks_read == 4
    wanted = statistics(load_model(root, torch.float32, CPU), root, (0, 1), 200)
    for layer in (0, 1):
        torch.testing.assert_close(found[layer].moment(), wanted[layer].moment())
