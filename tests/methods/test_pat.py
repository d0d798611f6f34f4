"""PAT: the worked numbers of the specification, the start of training, and the folded model against the gated one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmsurgery import prune
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Silent
from llmsurgery.errors import GateError, InputError, UsageError
from llmsurgery.methods.narrowing import narrowed_parameters, narrowed_tensors, stored_channels
from llmsurgery.methods.prune import pat
from llmsurgery.methods.widths import WidthConfig, Widths, widths_of
from llmsurgery.train import loop
from llmsurgery.train.loop import TrainingResult
from llmsurgery.train.optimizer import make_optimizer
from llmsurgery.train.width_gate import (
    Manner,
    WidthGate,
    count_loss,
    fixed_gate,
    identity_loss,
    soft_gate,
    temperature,
)

from ..builders.saving import SIZES, fill, save
from ..conftest import write_rows
from ..train.bench import Bench, config

TEXT = [{"text": "The river runs past the mill and the old bridge, and on to the sea at last. " * 2}] * 3
SETTINGS: dict[str, Any] = {"max_steps": 3, "window": 16, "samples": 8, "lr": 0.01, "eval.generate": False}
IDS = torch.arange(1, 41)[None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pat") / "text.jsonl", [dict(row) for row in TEXT])


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, separate head, biases on what writes too, an epsilon that shows."""
    torch.manual_seed(21)
    shape = LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2)
    return save(fill(LlamaForCausalLM(shape), 21), tmp_path_factory.mktemp("biased"), torch.float32)


def single(root: Path, out: Path) -> Path:
    """A copy of a checkpoint in fp32 and one file."""
    save_file(
        {name: tensor.float() for path in root.glob("*.safetensors") for name, tensor in load_file(path).items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    for path in root.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            (out / path.name).write_bytes(path.read_bytes())
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}))
    return out


def run(model: Path, text: Path, out: Path, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    chosen = {**SETTINGS, **(settings or {})}
    options = {"dtype": "float32", "calibration": text, **options}
    outcome = prune(model, method="pat", out=out, text=text, settings=chosen, **options)
    manifest: dict[str, Any] = outcome.manifest
    return manifest


# w = -.5, -.05, 0, .05, .5 at steps of a horizon of 10000: tau, beta, gates.
TABLE = {
    0: (1, 0.5, (0.8775, 0.9875, 1.0, 1.0125, 1.1225)),
    1000: (4, 0.4, (0.5192, 0.8502, 0.9, 0.9498, 1.2808)),
    2500: (6.6438, 0.25, (0.2848, 0.6677, 0.75, 0.8323, 1.2152)),
    5000: (13.2875, 0, (0.0013, 0.3398, 0.5, 0.6602, 0.9987)),
    8000: (41.2737, 0, (4.5e-5, 0.1127, 0.5, 0.8873, 1.0)),
    20000: (41.2737, 0, (4.5e-5, 0.1127, 0.5, 0.8873, 1.0)),
}


@pytest.mark.parametrize("step", TABLE)
def test_gates_of_the_table(step: int) -> None:
    tau, _, gates = TABLE[step]
    assert temperature(step, 10000) == pytest.approx(tau, abs=5e-4)
    proxy = torch.tensor([-0.5, -0.05, 0, 0.05, 0.5], requires_grad=True)
    values = soft_gate(proxy, step, 10000)
    torch.testing.assert_close(values.detach(), torch.tensor(gates), atol=6e-5, rtol=0)
    # What stands still has no gradient.
    assert values.requires_grad == (step < 8000)


def test_gates_that_are_not_learned_decay() -> None:
    kept = torch.tensor([True, False])
    found = [fixed_gate(kept, step, 100)[1].item() for step in (0, 100, 200)]
    assert found == pytest.approx([1, math.exp(-2.77), math.exp(-2.77 - 5.54)])
    assert fixed_gate(kept, 150, 100)[0] == 1


def test_count_loss_at_the_start() -> None:
    proxy = torch.zeros(4096, requires_grad=True)
    loss = count_loss(proxy, 3072)
    # No w is above 0: that mean is 0, the other one 0.5^2.
    assert loss.item() - 0.25 == pytest.approx(3.3333, abs=1e-4)
    loss.backward()
    assert proxy.grad is not None
    torch.testing.assert_close(proxy.grad - 1 / 4096, torch.full((4096,), 10 / 3072))
    both = torch.tensor([0.3, 0.3, -0.3, -0.1])
    assert count_loss(both, 2).item() == pytest.approx(0.04 + (0.04 + 0.16) / 2)


def test_identity_loss_is_a_mean_over_entries() -> None:
    assert identity_loss(torch.eye(2, 5)).item() == 0
    assert identity_loss(torch.tensor([[2.0, 0, 0], [0, 1, 0]])).item() == pytest.approx(9 / 4)


def test_a_norm_with_factor_and_fewer_channels_is_the_same() -> None:
    states, kept = torch.tensor([3.0, 0, 4, 0]), torch.tensor([0, 2])
    whole = states / states.square().mean().sqrt()
    torch.testing.assert_close(whole, torch.tensor([1.2, 0, 1.6, 0]))
    few = states[kept] / states[kept].square().mean().sqrt()
    torch.testing.assert_close(few, torch.tensor([0.848528, 1.131371]))
    torch.testing.assert_close(few * math.sqrt(4 / 2), whole[kept])


def shaped(config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Any:
    return detect(config, {name: SimpleNamespace(shape=shape, dtype="BF16") for name, shape in tensors.items()})


def smollm2() -> Any:
    """Names and shapes of SmolLM2-135M with a head of its own."""
    width, inner, groups = 576, 1536, 192
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (49152, width),
        "lm_head.weight": (49152, width),
        "model.norm.weight": (width,),
    }
    for layer in range(30):
        block = f"model.layers.{layer}"
        shapes = {"q": (width, width), "k": (groups, width), "v": (groups, width), "o": (width, width)}
        tensors |= {f"{block}.self_attn.{name}_proj.weight": shape for name, shape in shapes.items()}
        shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        tensors |= {f"{block}.mlp.{name}_proj.weight": shape for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{block}.{name}.weight": (width,) for name in norms}
    settings = {"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "hidden_size": width}
    return shaped(settings, tensors)


def test_parameters_of_smollm2_at_three_quarters() -> None:
    structure = smollm2()
    widths = widths_of(WidthConfig(), structure)
    assert (widths.keep, widths.stored) == (432, 432)
    total = sum(tensor.parameters for tensor in structure.tensors)
    assert total - narrowed_parameters(narrowed_tensors(structure), widths) == 122_119_920


def test_widths() -> None:
    structure = smollm2()
    assert widths_of(WidthConfig(sparsity=0.99), structure).keep == 144
    assert widths_of(WidthConfig(hidden=441), structure).keep == 441
    padded = widths_of(WidthConfig(hidden=430, padded=True), structure)
    assert (padded.keep, padded.stored) == (430, 432)
    with pytest.raises(UsageError, match="no multiple of the 9 heads") as caught:
        widths_of(WidthConfig(hidden=430), structure)
    assert "--hidden 423 or --hidden 432" in caught.value.fix
    with pytest.raises(UsageError, match="which is what the model has"):
        widths_of(WidthConfig(hidden=570, padded=True), structure)
    indices, alive = stored_channels(np.array([False, True, False, True, False]), 3)
    assert indices.tolist() == [0, 1, 3]
    assert alive.tolist() == [False, True, True]


def test_training_starts_from_the_source(biased: Path) -> None:
    bench = Bench(biased)
    gate = WidthGate(pat.operator_ranks(pat.PatConfig(), bench.structure, widths_of(WidthConfig(), bench.structure)),
                     32, 24, 100)  # fmt: skip
    with torch.no_grad():
        source = bench.model(input_ids=IDS).logits
        with gate.attached(bench.model, bench.structure):
            torch.testing.assert_close(bench.model(input_ids=IDS).logits, source)
            gate.proxy.copy_(torch.linspace(-1, 1, 32))
            assert not torch.allclose(bench.model(input_ids=IDS).logits, source)
            with gate.standing(Manner.AWAY):
                assert torch.equal(bench.model(input_ids=IDS).logits, source)
        assert torch.equal(bench.model(input_ids=IDS).logits, source)
    assert len(gate.operators) == 5
    assert gate.kept().nonzero().flatten().tolist() == list(range(8, 32))


def test_parameters_have_step_sizes_of_their_own() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = make_optimizer(parameters, 0.01, config(weight_decay=0.0), [1.0, 1.0, 5.0])
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert [parameter[0].item() for parameter in parameters] == pytest.approx([-0.01, -0.01, -0.05])


@dataclass
class Gated:
    """What a run's model with gates and operators of random values gave before it was folded."""

    logits: torch.Tensor
    gate: WidthGate


def gated_run(model: Path, text: Path, out: Path, settings: dict[str, Any], patch: pytest.MonkeyPatch) -> Gated:
    """Run the whole of `prune`, with random values in place of training."""
    kept: list[Gated] = []

    def draw(trainable: Any, loss: Any, *_: Any) -> TrainingResult:
        gate, random = loss.gate, torch.Generator().manual_seed(5)
        loss.begin([0])
        with torch.no_grad():
            for parameter in trainable.parameters:
                # Adapters and operators alike; scales stay around 1.
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random).to(parameter.device))
            signs = torch.rand(gate.proxy.shape, generator=random)
            gate.proxy.copy_(torch.where(signs < 0.5, signs - 1, signs))
            with gate.standing(Manner.ROUNDED):
                model = trainable.model.eval()
                kept.append(Gated(model(input_ids=IDS.to(model.device)).logits.cpu(), gate))
        return TrainingResult(1, "max_steps", 0.0, 0.0, 0.0, 1)

    patch.setattr(loop, "train", draw)
    run(model, text, out, settings)
    return kept[0]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def logits_of(root: Path) -> tuple[torch.Tensor, Any]:
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=IDS).logits, model


def test_the_folded_model_is_the_gated_one(
    biased: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = gated_run(biased, text, tmp_path / "out", {"hidden": 20}, monkeypatch)
    found, model = logits_of(tmp_path / "out")
    assert relative_error(found, gated.logits) <= 1e-5
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["hidden_size"], settings["head_dim"]) == (20, 8)
    assert settings["rms_norm_eps"] == pytest.approx(1e-2 * 32 / 20)
    # Each part of the recipe is needed.
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    with torch.inference_mode():
        for norm in norms:
            norm.variance_epsilon = 1e-2
        assert relative_error(model(input_ids=IDS).logits, gated.logits) > 1e-4
        for norm in norms:
            norm.variance_epsilon = 1e-2 * 32 / 20
            norm.weight.div_(math.sqrt(32 / 20))
        assert relative_error(model(input_ids=IDS).logits, gated.logits) > 0.1
        for norm in norms:
            norm.weight.mul_(math.sqrt(32 / 20))
        kept = gated.gate.kept().cpu()
        for layer, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight.div_(gated.gate.operator(("attn", layer)).scale.cpu()[kept][:, None])
            block.mlp.down_proj.weight.div_(gated.gate.operator(("mlp", layer)).scale.cpu()[kept][:, None])
        assert relative_error(model(input_ids=IDS).logits, gated.logits) > 0.1


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("tied_llama", {"hidden": 20}),
        ("tied_llama", {"hidden": 20, "untie": True}),
        ("tied_llama", {"hidden": 21, "padded": True}),
        ("gemma", {"hidden": 20}),
        ("phi3", {"hidden": 21, "padded": True}),
        ("qwen2_moe", {"hidden": 20, "train": "full", "roles": "all"}),
    ],
)
def test_other_layouts_fold_as_well(
    architecture: str,
    settings: dict[str, Any],
    checkpoints: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "model").mkdir()
    root = single(checkpoints[architecture], tmp_path / "model")
    gated = gated_run(root, text, tmp_path / "out", settings, monkeypatch)
    found, model = logits_of(tmp_path / "out")
    assert relative_error(found, gated.logits) <= 1e-5
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (architecture in ("tied_llama", "gemma") and "untie" not in settings)
    with torch.inference_mode():
        cached, plain = (
            model.generate(IDS, max_new_tokens=4, use_cache=use, do_sample=False, pad_token_id=256)
            for use in (True, False)
        )
    assert torch.equal(cached, plain)


@pytest.fixture(scope="module")
def whole(biased: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(biased, text, out, {"max_steps": 6, "save_every": 2, "teacher": True})


def test_a_run_is_counted_and_recorded(whole: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = whole
    keep, heads, groups, inner, vocabulary = 24, 32, 16, 64, SIZES["vocab_size"]
    block = 2 * keep * heads + 2 * keep * groups + 3 * keep * inner + 2 * keep
    biases = heads + 2 * groups + 2 * keep + 2 * inner
    expected = 2 * vocabulary * keep + 2 * (block + biases) + keep
    assert manifest["metrics"]["size.params"]["after"]["value"] == expected
    record = manifest["operations"][0]["record"]
    assert record["loss_last"] == record["loss_rounded"]
    assert record["undecided_gates"] == 0
    beside = json.loads((out / ".llmsurgery" / "width.json").read_text())
    assert len(beside["channels"]) == keep
    assert sum(beside["proxies_from_minus_1_to_1"]) <= 32
    assert set(beside["operator_norms"]) == {"embed", "attn.0", "attn.1", "mlp.0", "mlp.1"}
    # What the reloaded model gives is what the gated one gave, or a notice would tell.
    assert not any("stored result" in notice for notice in manifest["notices"])


def test_a_killed_run_goes_on_at_the_step_of_its_gate(
    whole: tuple[Path, dict[str, Any]], biased: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmsurgery.train.width_loss import WidthLoss

    original = WidthLoss.begin

    def stop(self: WidthLoss, indices: Any) -> None:
        original(self, indices)
        if self.gate.step == 3:
            raise KeyboardInterrupt

    settings = {"max_steps": 6, "save_every": 2, "teacher": True}
    with monkeypatch.context() as patch:
        patch.setattr(WidthLoss, "begin", stop)
        with pytest.raises(KeyboardInterrupt):
            run(biased, text, tmp_path / "out", settings)
    run(biased, text, tmp_path / "out", settings, resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def test_a_run_killed_behind_its_training_knows_how_its_gate_stood(
    biased: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pat, "folded", stop)
        with pytest.raises(KeyboardInterrupt):
            run(biased, text, tmp_path / "out", {"save_every": 1})
    record = run(biased, text, tmp_path / "out", {"save_every": 1}, resume=True)["operations"][0]["record"]
    assert record["loss_last"] == record["loss_rounded"]


def test_the_source_is_the_teacher(biased: Path, text: Path, tmp_path: Path) -> None:
    for train in ("lora", "full"):
        settings = {"max_steps": 1, "train": train, "rounded": 0.0, "teacher": True}
        record = run(biased, text, tmp_path / train, settings)["operations"][0]["record"]
        # At the first step the gated model is the source.
        assert record["row_loss"] == pytest.approx(0, abs=1e-6)


def test_undecided_gates_fail(biased: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="100% of the gates are undecided") as caught:
        run(biased, text, tmp_path / "out", {"gate_lr": 1e-6, "rounded": 0.0})
    assert caught.value.exit_code == 6
    # 18 over the horizon, which is 3 in so short a run.
    assert "gate_lr=6, it was 1e-06" in caught.value.fix
    assert not list(tmp_path.iterdir())
    # Under the rounded gate the weights have learned to do with the choice.
    manifest = run(biased, text, tmp_path / "out", {"gate_lr": 1e-6})
    assert any("100% of the gates are undecided" in notice for notice in manifest["notices"])


def test_settings_that_are_left_to_the_method(biased: Path) -> None:
    usual = pat.PatConfig()
    # A fifth of the steps, 60 where these are fewer, and less where the gates would not stand still in time.
    assert [pat.horizon_of(usual, steps) for steps in (3000, 300, 200, 100)] == [600, 60, 60, 41]
    assert pat.horizon_of(replace(usual, horizon=7), 300) == 7
    assert pat.gate_step(usual, 60) == pytest.approx(0.3)
    assert pat.gate_step(replace(usual, gate_lr=0.1), 60) == 0.1
    structure = detect(json.loads((biased / "config.json").read_text()), Checkpoint.open(biased).tensors)
    ranks = []
    for width, given in ((4096, None), (576, None), (32, None), (2, None), (32, 64)):
        widths = Widths(width, width, width)
        ranks.append(pat.operator_ranks(replace(usual, operator_rank=given), structure, widths)["attn", 0])
    assert ranks == [200, 192, 10, 1, 32]


def test_advice_on_undecided_gates_is_no_value_that_was_tried() -> None:
    gate = WidthGate({("embed", None): 0}, 8, 4, 60)
    gate.manner = Manner.ROUNDED
    told = Silent()
    for tried in (0.03, 0.3, 0.5):
        pat.require_decided(gate, tried, 300, told)
    assert [float(text.split("gate_lr=")[1].split(",")[0]) for text in told.notices] == [0.3, 0.6, 1.0]


def test_a_set_that_is_not_learned(biased: Path, text: Path, tmp_path: Path) -> None:
    run(biased, text, tmp_path / "out", {"kept": "first", "hidden": 12})
    beside = json.loads((tmp_path / "out" / ".llmsurgery" / "width.json").read_text())
    assert beside["channels"] == list(range(12))


def test_what_is_trained_on(biased: Path, text: Path, tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "Orla."}])
    manifest = run(biased, text, tmp_path / "out", calibration=questions)
    assert manifest["data"]["calibration"]["rows"] == 1
    short = write_rows(tmp_path / "short.jsonl", [{"text": "Too short."}])
    with pytest.raises(InputError, match="--calibration has 11 tokens"):
        run(biased, text, tmp_path / "no", calibration=short)
