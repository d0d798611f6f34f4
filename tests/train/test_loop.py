"""The training loop: one step whatever the micro-batches, its stops and its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.head import batch_log_probabilities
from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoder
from llmsurgery.data.collate import collate
from llmsurgery.data.records import Row
from llmsurgery.edits.kinds import LowRank, Replace
from llmsurgery.errors import DivergedError, InputError, NoEffectError, UsageError
from llmsurgery.methods.settings import resolve_config
from llmsurgery.train.config import TrainingConfig, suitable_lr
from llmsurgery.train.loop import Sampler, TrainingResult, planned_steps, train
from llmsurgery.train.pooling import row_means
from llmsurgery.train.trainable import Trainable, prepare_trainable

ROWS = [
    Row("qa", "Who?", "Orla."),
    Row("qa", "Where is the mill?", "By the weir, on the far side."),
    Row("qa", "What is it?", "A dog."),
    Row("completion", "The river runs", " past the mill and the old bridge."),
]


def config(**settings: object) -> TrainingConfig:
    resolved: TrainingConfig = resolve_config(TrainingConfig, {"lr": 1e-3, "max_steps": 1, **settings})
    return resolved


class Bench:
    """A loaded model with encoded rows and a plain loss."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = Checkpoint.open(root)
        self.structure = detect(self.checkpoint.config, self.checkpoint.tensors)
        self.model: PreTrainedModel = load_model(root, dtype, torch.device("cpu"))
        encoder = Encoder(load_tokenizer(root), 256)
        self.rows = [encoder.encode(row) for row in ROWS]
        self.pad = encoder.pad_id
        self.autocast: torch.dtype | None = None
        self.seen: list[list[int]] = []

    def read(self, name: str) -> np.ndarray:
        return decode(self.checkpoint.read(name), self.checkpoint.info(name).dtype)

    def loss(self, indices: Sequence[int]) -> torch.Tensor:
        """Mean over rows of the mean negative log-likelihood."""
        self.seen.append(list(indices))
        batch = collate([self.rows[i] for i in indices], self.pad, torch.device("cpu"))
        scores, owners = batch_log_probabilities(
            self.model, batch.input_ids, batch.attention_mask, batch.label_mask, self.autocast
        )
        return -row_means(scores, owners, len(indices)).mean()

    @contextmanager
    def trainable(self, settings: TrainingConfig, targets: Sequence[RoleTensor] | None = None) -> Iterator[Trainable]:
        torch.manual_seed(0)
        chosen = targets or self.structure.select(settings.roles, settings.layers or None)
        with prepare_trainable(self.model, chosen, settings, self.read) as trainable:
            self.autocast = trainable.autocast
            yield trainable

    def train(
        self,
        settings: TrainingConfig,
        micro_batch: int | None = None,
        loss: Callable[[Sequence[int]], torch.Tensor] | None = None,
        reached: Callable[[torch.dtype | None], bool] | None = None,
    ) -> tuple[TrainingResult, dict[str, np.ndarray]]:
        with self.trainable(settings) as trainable:
            result = train(trainable, loss or self.loss, len(ROWS), settings, 0, micro_batch, Silent(), reached)
            edits = trainable.edits()
        values = {}
        for edit in edits:
            assert isinstance(edit, LowRank | Replace)
            values[edit.name] = edit.u @ edit.v if isinstance(edit, LowRank) else edit.values
        return result, values


@pytest.mark.parametrize("way", ["lora", "full"])
def test_micro_batches_give_the_same_step(way: str, checkpoints: dict[str, Path]) -> None:
    settings = config(train=way, roles="linear", max_steps=2)
    steps = [Bench(checkpoints["sharded_llama"]).train(settings, micro) for micro in (None, 1, 3)]
    (whole, expected), *others = steps
    bench = Bench(checkpoints["sharded_llama"])
    for result, values in others:
        assert [result.first_loss, result.last_loss] == pytest.approx([whole.first_loss, whole.last_loss], abs=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(values[name], value, atol=1e-5, rtol=0)
    for name, value in expected.items():
        change = value - bench.read(name) if way == "full" else value
        assert np.abs(change).max() > 1e-4, "the step moved nothing"


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2", "tied_llama"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_training_lowers_the_loss(way: str, architecture: str, checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints[architecture], torch.float32 if way == "lora" else torch.bfloat16)
    roles = "linear" if way == "lora" else "all"
    result, _ = bench.train(config(train=way, roles=roles, max_steps=12, lr=5e-3))
    assert (result.steps, result.stopped) == (12, "max_steps")
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < 0.9 * result.first_loss


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2"])
def test_edits_describe_the_trained_model(architecture: str, checkpoints: dict[str, Path]) -> None:
    bench, plain = Bench(checkpoints[architecture]), Bench(checkpoints[architecture])
    _, changes = bench.train(config(max_steps=3, lr=0.01))
    by_name = {tensor.stored: tensor for tensor in bench.structure.tensors}
    with torch.no_grad():
        for name, change in changes.items():
            weight = plain.model.get_submodule(by_name[name].module).weight
            weight += torch.from_numpy(change).float()
        torch.testing.assert_close(bench.loss(range(4)), plain.loss(range(4)), atol=1e-5, rtol=0)


def test_adapters_off_is_the_untrained_model(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    before = bench.loss(range(4)).item()
    settings = config(max_steps=4, lr=0.01)
    with bench.trainable(settings) as trainable, torch.no_grad():
        assert trainable.reference is not None
        with torch.enable_grad():
            train(trainable, bench.loss, len(ROWS), settings, 0, None, Silent())
        after = bench.loss(range(4)).item()
        with trainable.reference():  # type: ignore[attr-defined]
            assert bench.loss(range(4)).item() == before
        assert bench.loss(range(4)).item() == after
    assert abs(after - before) > 1e-3
    with Bench(checkpoints["sharded_llama"]).trainable(config(train="full")) as trainable:
        assert trainable.reference is None


@pytest.mark.parametrize("way", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(way: str, checkpoints: dict[str, Path]) -> None:
    gradients = []
    for recompute in (False, True):
        bench = Bench(checkpoints["sharded_llama"])
        with bench.trainable(config(train=way, gradient_checkpointing=recompute)) as trainable:
            assert bench.model.is_gradient_checkpointing == recompute
            bench.loss(range(4)).backward()
            gradients.append([parameter.grad for parameter in trainable.parameters])
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[1])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_full_training_starts_from_the_stored_values_in_fp32(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["gpt2"], torch.bfloat16)
    with bench.trainable(config(train="full", roles="mlp.down", layers="1")) as trainable:
        (parameter,) = trainable.parameters
        (edit,) = trainable.edits()
        assert trainable.autocast == torch.bfloat16
    assert isinstance(edit, Replace)
    assert parameter.dtype == torch.float32
    assert np.array_equal(edit.values, bench.read(edit.name))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_diverged(value: float, checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    calls: list[int] = []

    def broken(indices: Sequence[int]) -> torch.Tensor:
        calls.append(len(calls))
        return bench.loss(indices) * (value if len(calls) == 3 else 1.0)

    with pytest.raises(DivergedError, match="step 3") as caught:
        bench.train(config(max_steps=9), loss=broken)
    assert caught.value.exit_code == 9
    assert len(calls) == 3


def test_gradient_that_is_not_finite_diverged(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    with pytest.raises(DivergedError, match="gradient"):
        # The loss is 0, its slope is not a number.
        bench.train(config(), loss=lambda indices: (bench.loss(indices) * 0).sqrt())


def test_loss_without_a_gradient_is_no_effect(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    with pytest.raises(NoEffectError) as caught:
        bench.train(config(max_steps=9), loss=lambda indices: bench.loss(indices) * 0)
    assert caught.value.exit_code == 5
    assert len(bench.seen) == 1


def test_no_rows_is_an_input_error(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    with bench.trainable(config()) as trainable, pytest.raises(InputError):
        train(trainable, bench.loss, 0, config(), 0, None, Silent())


def test_adapters_go_on_matrices_only(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"embed, norm\.final"):
        Bench(checkpoints["sharded_llama"]).train(config(roles="norm.final,embed,mlp.up"))


def test_training_ends_when_the_stop_rule_holds(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    checks: list[int] = []

    def reached(autocast: torch.dtype | None) -> bool:
        assert autocast is None
        checks.append(len(bench.seen))
        return len(checks) == 2

    result, _ = bench.train(config(max_steps=20, check_every=3), reached=reached)
    assert checks == [3, 6]
    assert (result.steps, result.stopped) == (6, "until")


def test_every_epoch_visits_every_row_once() -> None:
    sampler = Sampler(7, seed=0)
    drawn = [index for _ in range(7) for index in sampler.draw(3)]
    epochs = [drawn[start : start + 7] for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert Sampler(7, seed=0).draw(21) == drawn
    assert Sampler(7, seed=1).draw(21) != drawn


def test_batches_of_the_loop_follow_the_sampler(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    bench.train(config(max_steps=2, batch_size=3), 2)
    first, second = Sampler(4, 0).draw(3), Sampler(4, 0).draw(6)[3:]
    assert bench.seen == [first[:2], first[2:], second[:2], second[2:]]


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({"max_steps": 7}, 100, 7),
        ({"max_steps": 0, "epochs": 3, "batch_size": 2}, 5, 9),
        ({"max_steps": 0, "epochs": 3, "batch_size": 8}, 5, 3),
        ({"max_steps": 4, "epochs": 3, "batch_size": 2}, 5, 4),
        ({"max_steps": 50, "epochs": 3, "batch_size": 2}, 5, 9),
    ],
)
def test_number_of_steps(settings: dict[str, object], rows: int, steps: int) -> None:
    assert planned_steps(config(**settings), rows) == steps


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup_steps": 2}, [0, 0.5, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.5]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
        # One epoch of warm-up: four rows in batches of one.
        ({"warmup_steps": -1, "batch_size": 1}, [0, 0.25, 0.5, 0.75]),
    ],
)
def test_step_size_over_time(
    settings: dict[str, object], rates: list[float], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object, **named: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    Bench(checkpoints["sharded_llama"]).train(config(max_steps=4, lr=0.01, layers="1", **settings))
    assert seen == pytest.approx([0.01 * rate for rate in rates], abs=1e-9)


def test_step_size_suits_the_width() -> None:
    assert suitable_lr(576, "lora") == suitable_lr(4096, "lora") == 1e-4
    assert suitable_lr(576, "full") == 1e-5
    assert suitable_lr(64, "lora") == pytest.approx(2.7e-3)
