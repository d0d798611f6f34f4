"""D-Pruner's pass over a domain: tuning against plain SGD, gradients freed at once, and runs killed in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmsurgery.compute.load import load_model
from llmsurgery.compute.progress import Silent
from llmsurgery.compute.view import weight_view
from llmsurgery.errors import UsageError
from llmsurgery.methods.domain_importance import DomainPass, scheduled
from llmsurgery.methods.prune.d_pruner import DPrunerConfig, settings_of_pass
from llmsurgery.train.state import StateStore
from llmsurgery.train.weight_gradients import handed_gradients, text_backward

from .test_prune import data, roles, run, stored, windows_of

__all__ = ["data"]

RATE, EPOCHS = 0.5, 2


def of(model: Any, structure: Any) -> tuple[Any, list[Any]]:
    session = SimpleNamespace(store=None)
    return SimpleNamespace(model=model, training=session, progress=Silent()), structure.select(["linear"])


def test_tuning_is_sgd_with_a_cut_gradient(checkpoints: dict[str, Path], data: dict[str, Path]) -> None:
    root = checkpoints["gpt2"]
    structure, ids = roles(root), windows_of(root, data["domain"])[:4]
    model, plain = (load_model(root, torch.float32, torch.device("cpu")) for _ in range(2))
    operation, targets = of(model, structure)
    config = DPrunerConfig(tune=True, epochs=EPOCHS, rate=RATE, max_norm=0.5, batch=2, general="none")
    windows = [tuple(row.tolist()) for row in ids]
    found, record = DomainPass(settings_of_pass(config, 0), operation, targets, windows, None).run()

    weights = [plain.get_submodule(target.module).weight for target in targets]
    sums = [torch.zeros_like(weight) for weight in weights]
    losses, cuts = [], 0
    for step in range(2 * EPOCHS):
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        batch = ids[step % 2 * 2 :][:2]
        loss = plain(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        for weight, total in zip(weights, sums, strict=True):
            product = weight.grad * weight.detach()
            total += (product + product.square() / 4).abs()
        cuts += float(torch.nn.utils.clip_grad_norm_(weights, 0.5)) > 0.5
        with torch.no_grad():
            for weight in weights:
                weight -= RATE * scheduled(step, 4, 0.1) * weight.grad
    assert cuts == 2 * EPOCHS
    for target, weight, total in zip(targets, weights, sums, strict=True):
        torch.testing.assert_close(weight_view(model, target), weight.detach(), atol=2e-5, rtol=1e-4)
        own = total.T if target.transposed else total
        torch.testing.assert_close(found[target.stored].value(own), own, atol=1e-6, rtol=1e-3)
    assert record["domain_loss"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-4)
    assert record["tuned_domain_loss"] == pytest.approx(sum(losses[2:]) / 2, rel=1e-3)
    assert sum(losses[2:]) < sum(losses[:2])


def test_the_step_size_rises_and_falls() -> None:
    assert [scheduled(step, 10, 0.2) for step in range(10)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert scheduled(0, 1, 0.0) == 1
    assert 0 < scheduled(0, 1, 1.0) <= 1


def test_two_gradients_are_never_held(checkpoints: dict[str, Path], data: dict[str, Path]) -> None:
    root = checkpoints["sharded_llama"]
    model = load_model(root, torch.float32, torch.device("cpu"))
    targets, held = roles(root).select(["linear"]), []

    def receive(target: Any, gradient: torch.Tensor) -> None:
        held.append((target.stored, sum(parameter.grad is not None for parameter in model.parameters())))

    with handed_gradients(model, targets, receive):
        text_backward(model, windows_of(root, data["domain"])[:1])
    assert sorted(name for name, _ in held) == sorted(target.stored for target in targets)
    assert {count for _, count in held} == {0}


def test_passes_without_tuning_are_all_the_same(
    checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="epochs is 3 without tune") as caught:
        run("d-pruner", checkpoints["gpt2"], data, tmp_path / "out", settings={"epochs": 3})
    assert caught.value.fix


def killed(saves: int, work: Any) -> None:
    """Run something in a process that is killed with SIGKILL as soon as it has kept so many states."""
    child = os.fork()
    if child == 0:
        original, left = StateStore.save, [saves]

        def save(self: StateStore, stage: int, state: Any) -> None:
            original(self, stage, state)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        StateStore.save = save  # type: ignore[method-assign]
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_a_killed_run_ends_in_the_bytes_of_a_whole_one(
    checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, settings = checkpoints["sharded_llama"], {"tune": True, "epochs": 2, "domain_samples": 4}

    def go(out: Path, **options: Any) -> dict[str, Any]:
        return run("d-pruner", root, data, out, settings=settings, dtype="float32", **options)

    whole = go(tmp_path / "whole")
    # Behind one block of the walk, in the middle of the pass over the domain, and behind one pruned block.
    for saves in (1, 4, 7):
        out = tmp_path / f"out{saves}"
        killed(saves, lambda out=out: go(out))
        assert not out.exists()
        kept = sorted(path.name for path in (tmp_path / f"{out.name}.partial").glob("*/training-*.safetensors"))
        assert kept == [f"training-{stage}.safetensors" for stage in range({1: 1, 4: 3, 7: 4}[saves])]
        resumed = go(out, resume=True)
        one, two = stored(tmp_path / "whole"), stored(out)
        assert all(torch.equal(values, two[name]) for name, values in one.items())
        assert resumed["operations"][0]["record"] == whole["operations"][0]["record"]


def phases(method: str, root: Path, data: dict[str, Path], tmp_path: Path, **settings: object) -> dict[str, int]:
    manifest = run(method, root, data, tmp_path / "out", dry_run=True, settings=settings)
    memory = manifest["memory"]
    assert manifest["memory_bytes"] == max(memory["phases"].values())
    return {name: size - memory["base"] for name, size in memory["phases"].items()}


def test_a_dry_run_counts_second_moments_and_gradients(
    checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints["sharded_llama"]
    targets = roles(root).select(["linear"])
    entries, widths = sum(target.parameters for target in targets), {t.role: t.shape[1] for t in targets}
    plain = phases("magnitude", root, data, tmp_path)
    assert set(plain) == {"loading", "before", "result"}
    wanda, sparsegpt = (phases(name, root, data, tmp_path)["pruning"] for name in ("wanda", "sparsegpt"))
    # One second moment each for attention, its output, the MLP and its output, and five at once of the widest.
    moments = 4 * (2 * widths["attn.q"] ** 2 + widths["mlp.gate"] ** 2 + widths["mlp.down"] ** 2)
    assert sparsegpt - wanda > moments + 4 * 4 * widths["mlp.down"] ** 2 - 64 * 1024
    found = phases("d-pruner", root, data, tmp_path)
    assert set(found) == {*plain, "general importance", "gradients", "pruning"}
    # Four bytes a weight for the sums; the gradients of all weights together are not there.
    assert 4 * entries < found["gradients"] - plain["before"] + 256 * 1024
    # A second sum, and the importance of every weight for ordinary text.
    dense = phases("d-pruner", root, data, tmp_path, form="obs", importance="sequential")
    for name in ("gradients", "pruning"):
        assert dense[name] - found[name] == 8 * entries
    assert dense["general importance"] > found["general importance"] + moments
