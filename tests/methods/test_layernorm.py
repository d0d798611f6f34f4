"""Norms as constants: the worked numbers of the specification, the switches in stock models, and both stored forms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from llmsurgery.arch.detect import detect
from llmsurgery.arch.norms import norms_of
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.fake_norms import FIRST, OTHERS, REST, VALUES, FakeNorms, affine_error
from llmsurgery.compute.view import weight_view
from llmsurgery.errors import DivergedError, UnsupportedError, UsageError
from llmsurgery.methods.norm_folding import constant_norms, folded_constants, folded_gains
from llmsurgery.methods.remove_layernorm.fakeln import Fakeln, FakelnConfig, events
from llmsurgery.methods.settings import resolve_config
from llmsurgery.train.norm_removal import Removal, RemovalSettings, auxiliary_loss
from llmsurgery.train.norm_schedule import SIZES, events_of

from ..builders import dense
from ..builders.saving import SIZES as SHAPE
from ..builders.saving import fill, save

IDS = torch.arange(1, 41).view(2, 20)
END = 7


@dataclasses.dataclass
class Source:
    """A tiny checkpoint in fp32."""

    root: Path
    structure: Structure
    checkpoint: Checkpoint

    def model(self, **changes: Any) -> Any:
        """Load it with stock transformers, with values of its config changed."""
        model = AutoModelForCausalLM.from_pretrained(self.root, dtype=torch.float32, **changes)
        return model.eval().requires_grad_(False)

    def read(self, name: str) -> Any:
        return decode(self.checkpoint.read(name), self.checkpoint.info(name).dtype)

    def stored_form(self, values: Any, scale: float | None) -> Any:
        """Load it and put new values in place, with eps = scale^2."""
        model = self.model(**({} if scale is None else {self.structure.family.norm_eps: scale**2}))
        places = {tensor.stored: tensor for tensor in self.structure.tensors}
        with torch.no_grad():
            for name, made in values.items():
                weight_view(model, places[name]).copy_(torch.from_numpy(np.asarray(made)))
        return model


def gpt2(root: Path) -> Path:
    config = GPT2Config(
        vocab_size=262, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2, bos_token_id=257,
        eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(5)
    return save(fill(GPT2LMHeadModel(config), 5), root, torch.float32)


def gpt_neox(root: Path) -> Path:
    torch.manual_seed(6)
    return save(fill(GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)), 6), root, torch.float32)


def unbiased_neox(root: Path) -> Path:
    torch.manual_seed(7)
    return save(fill(GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, attention_bias=False)), 7), root, torch.float32)


MAKERS = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "unbiased_neox": unbiased_neox,
    "qwen3": dense.qwen3,
    "gemma": dense.gemma,
    "gemma2": dense.gemma2,
    "phi3": dense.phi3,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Source] = {}

    def get(name: str) -> Source:
        if name not in made:
            root = MAKERS[name](tmp_path_factory.mktemp("norms") / name)
            checkpoint = Checkpoint.open(root)
            made[name] = Source(root, detect(checkpoint.config, checkpoint.tensors), checkpoint)
        return made[name]

    return get


def switched(model: Any, structure: Structure, special: bool = False) -> FakeNorms:
    """Norms that all divide by constants of their own."""
    norms = FakeNorms(model, structure, END, special)
    for number in range(len(norms.norms)):
        norms.state.sigma[number] = torch.tensor([0.7 + 0.1 * number, 3.0])
        norms.throw(number)
    return norms


def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.fixture
def tiny(sources: Any) -> Iterator[tuple[Any, FakeNorms]]:
    source = sources("gpt2")
    model = source.model()
    norms = FakeNorms(model, source.structure, END)
    with norms.attached():
        yield model, norms


def test_fake_norm_of_the_specification(tiny: tuple[Any, FakeNorms]) -> None:
    _, norms = tiny
    norms.state.sigma[0] = 4.0
    module = torch.nn.LayerNorm(2)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(0.5)
    states = torch.tensor([[[1.0, 3.0]]])
    made = norms._constant(0, module, states, states, False)
    assert made.flatten().tolist() == pytest.approx([0.0, 1.0])
    assert module(states).flatten().tolist() == pytest.approx([-1.5, 2.5], abs=1e-4)


def test_auxiliary_loss_of_the_specification() -> None:
    spreads = torch.tensor([[10.0, 1.0, 2.0, 3.0]], requires_grad=True)
    loss = auxiliary_loss(spreads, torch.tensor([[1, 2, 3, 50256]]), 50256)
    assert loss.item() == pytest.approx(18.75)
    assert 0.1 * loss.item() == pytest.approx(1.875)
    # The middle carries no gradient.
    (slope,) = torch.autograd.grad(loss, spreads)
    assert slope.flatten().tolist() == pytest.approx([2 * (s - 1.5) / 4 for s in (10, 1, 2, 3)])


def test_sigma_follows_once_a_step_and_is_locked_by_the_first_switch(tiny: tuple[Any, FakeNorms]) -> None:
    _, norms = tiny
    state = norms.state
    state.sigma.fill_(2.0)
    for _ in range(2):
        state.sums += 3.0 * 5
        state.counts += 5
        norms.end_step(0.9)
    assert float(state.sigma[0, REST]) == pytest.approx(2.19)
    norms.throw(0, OTHERS)
    state.sums += 100.0
    state.counts += 1
    norms.end_step(0.9)
    assert float(state.sigma[0, REST]) == pytest.approx(2.19)
    assert float(state.sigma[1, REST]) > 10


@pytest.mark.parametrize(("name", "last"), [("small", 104), ("medium", 188), ("large", 534), ("xl", 722)])
def test_schedule_by_size(name: str, last: int) -> None:
    size = SIZES[name]
    made = events_of(size.blocks, size.start, (size.gap_mlp, size.gap_qk, size.gap_v))
    assert len(made) == len({(event.kind, event.layer) for event in made}) == 3 * size.blocks + 1
    assert made[-1].kind == "final"
    assert made[-1].step == last
    assert [event.step for event in made] == sorted(event.step for event in made)
    special = events_of(size.blocks, size.start, (size.gap_mlp, size.gap_qk, size.gap_v), special=True)
    assert len(special) == 4 * size.blocks + 2
    assert special[-1].step == last + 2 + size.blocks - 1 + 10


def test_settings_follow_the_size_and_the_steps(sources: Any) -> None:
    structure, method = sources("gpt2").structure, Fakeln()
    config = method.settle(FakelnConfig(), structure)
    assert (config.max_steps, config.start, config.gap_v, config.aux, config.pace) == (300, 20, 3, 0.1, 1.0)
    # 768 over a width of 32.
    assert config.lr == pytest.approx(6e-4 * 24**0.5, rel=0.03)
    short = method.settle(FakelnConfig(max_steps=12), structure)
    assert short.pace is not None
    assert short.pace < 1
    assert events(short, structure)[-1].step < 12
    # What a manifest records gives the same schedule again.
    assert events(method.settle(short, structure), structure) == events(short, structure)
    with pytest.raises(UsageError, match="last norm would go"):
        method.settle(FakelnConfig(max_steps=12, pace=1.0), structure)
    preset = resolve_config(FakelnConfig, {"preset": "xl"}, method.spec.presets)
    assert (preset.lr, preset.lr_end, preset.momentum, preset.aux) == (1e-4, 0.2, 0.9425, 0.01)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "qwen3"])
def test_queries_and_keys_go_before_values(name: str, sources: Any) -> None:
    source = sources(name)
    model, structure = source.model(), source.structure
    norms = FakeNorms(model, structure, END)
    place = norms.place("norm.attn", 1)
    assert place is not None
    norms.state.sigma[place] = 0.6
    outputs: dict[str, torch.Tensor] = {}
    for tensor in structure.tensors:
        if (
            tensor.layer == 1
            and tensor.part == "weight"
            and tensor.role.startswith("attn.")
            and tensor.role != "attn.o"
        ):
            module = model.get_submodule(tensor.module)
            # Registered before the switches: it sees what the module itself makes of its input.
            module.register_forward_hook(lambda _m, _a, output, role=tensor.role: outputs.__setitem__(role, output))
    read: dict[str, dict[str, torch.Tensor]] = {}
    for label, thrown in (("real", ()), ("qk", (OTHERS,)), ("all", (OTHERS, VALUES))):
        for switch in thrown:
            norms.throw(place, switch)
        with norms.attached():
            if "attn.qkv" in structure.roles:
                path = next(t.module for t in structure.tensors if t.role == "attn.qkv" and t.layer == 1)
                handle = model.get_submodule(path).register_forward_hook(
                    lambda _m, _a, output: outputs.__setitem__("attn.qkv", output)
                )
                logits_of(model)
                handle.remove()
            else:
                logits_of(model)
        read[label] = dict(outputs)
    heads = 4
    for role, mixed in read["qk"].items():
        real, fake = read["real"][role], read["all"][role]
        assert not torch.equal(real, fake)
        if role == "attn.v":
            assert torch.equal(mixed, real)
        elif role != "attn.qkv":
            assert torch.equal(mixed, fake)
        elif structure.family.qkv_by_head:
            parts = [value.view(*value.shape[:2], heads, 3, -1) for value in (mixed, real, fake)]
            assert torch.equal(parts[0][..., 2, :], parts[1][..., 2, :])
            assert torch.equal(parts[0][..., :2, :], parts[2][..., :2, :])
        else:
            groups = getattr(model.config, "num_key_value_heads", heads)
            border = mixed.shape[-1] * (heads + groups) // (heads + 2 * groups)
            assert torch.equal(mixed[..., border:], real[..., border:])
            assert torch.equal(mixed[..., :border], fake[..., :border])


def test_special_positions_divide_by_their_own_constant(sources: Any) -> None:
    source = sources("gpt2")
    model = source.model()
    norms = switched(model, source.structure, special=True)
    place = norms.place("norm.attn", 0)
    assert place is not None
    module = norms.modules[place]
    states = torch.randn(2, 20, 32)
    norms.ids = IDS
    plain = norms._constant(place, module, states, states, False)
    values = norms._constant(place, module, states, states, True)
    gain, bias = module.weight, module.bias
    wide = (states - states.mean(-1, keepdim=True)) * gain
    own = norms.state.sigma[place].float()
    assert torch.allclose(plain[:, 0], wide[:, 0] / own[FIRST] + bias, atol=1e-5)
    assert torch.allclose(plain[:, 1:], wide[:, 1:] / own[REST] + bias, atol=1e-5)
    # Token 7 ends documents: values alone see it.
    assert torch.allclose(values[0, 6], wide[0, 6] / own[FIRST] + bias, atol=1e-5)
    assert torch.allclose(values[0, 5], plain[0, 5])
    with norms.attached():
        logits_of(model)
        norms.state.ends.fill_(False)
        norms.state.special.fill_(False)
        scalar = logits_of(model)
    # Sigma is one number now, and so is what is stored.
    sigmas = {norm.name: float(norms.state.sigma[n, REST]) for n, norm in enumerate(norms.norms)}
    made = constant_norms(source.structure, source.read, sigmas, 1e6)
    assert torch.allclose(logits_of(source.stored_form(made.values, 1e6)), scalar, atol=1e-4)


def sigmas_of(structure: Structure) -> dict[str, float]:
    return {norm.name: 0.7 + 0.1 * number for number, norm in enumerate(norms_of(structure))}


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "unbiased_neox", "qwen3", "gemma", "gemma2"])
def test_both_forms_have_the_logits_of_constant_norms(name: str, sources: Any) -> None:
    source = sources(name)
    model = source.model()
    real = logits_of(model)
    with switched(model, source.structure).attached():
        wanted = logits_of(model)
    size = float(wanted.abs().max())
    assert float((wanted - real).abs().max()) > 0.05 * size
    for make in (constant_norms, folded_constants):
        made = make(source.structure, source.read, sigmas_of(source.structure), 1e6)
        stored = source.stored_form(made.values, 1e6)
        # Logits of gemma2 are capped at 3, and thousands before: what is left of the digits is rounding.
        assert float((logits_of(stored) - wanted).abs().max()) < (1e-3 if name == "gemma2" else 5e-5) * size
        for norm in norms_of(source.structure):
            module = stored.get_submodule(norm.weight.module)
            states = torch.randn(3, norm.weight.shape[0])
            assert affine_error(module, states) < 1e-5
            assert affine_error(model.get_submodule(norm.weight.module), states) == pytest.approx(0.5, abs=0.05)


def test_error_of_the_large_epsilon(sources: Any) -> None:
    source = sources("gpt2")
    model = source.model()
    with switched(model, source.structure).attached():
        wanted = logits_of(model)
    errors = {}
    for scale in (1e2, 1e4, 1e6):
        made = constant_norms(source.structure, source.read, sigmas_of(source.structure), scale)
        errors[scale] = float((logits_of(source.stored_form(made.values, scale)) - wanted).abs().max())
    assert errors[1e2] > 100 * errors[1e4]
    assert errors[1e6] < 1e-4
    # In fp16 the gains are infinite: that is why it is refused.
    made = constant_norms(source.structure, source.read, sigmas_of(source.structure), 1e6)
    assert max(np.abs(values).max() for values in made.values.values()) > 65504


def test_folded_norms_can_be_left_out_thanks_to_the_centred_weights(sources: Any) -> None:
    source = sources("gpt2")
    model = source.model()
    with switched(model, source.structure).attached():
        wanted = logits_of(model)
    made = folded_constants(source.structure, source.read, sigmas_of(source.structure), 1e6)
    bare = source.stored_form(made.values, 1e6)
    for block in bare.transformer.h:
        block.ln_1 = block.ln_2 = torch.nn.Identity()
    assert torch.allclose(logits_of(bare), wanted, atol=2e-4)
    # Without C they read the mean as well.
    flawed = dict(made.values)
    for tensor in source.structure.tensors:
        if tensor.role in ("attn.qkv", "mlp.up") and tensor.part == "weight":
            flawed[tensor.stored] = made.values[tensor.stored] + 0.1
    wrong = source.stored_form(flawed, 1e6)
    for block in wrong.transformer.h:
        block.ln_1 = block.ln_2 = torch.nn.Identity()
    assert not torch.allclose(logits_of(wrong), wanted, atol=1e-2)
    assert torch.allclose(logits_of(source.stored_form(flawed, 1e6)), wanted, atol=2e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "unbiased_neox", "gemma"])
@pytest.mark.parametrize("centre", [True, False])
def test_folded_gains_change_no_logit(name: str, centre: bool, sources: Any) -> None:
    source = sources(name)
    made = folded_gains(source.structure, source.read, centre)
    folded = source.stored_form(made.values, None)
    wanted = logits_of(source.model())
    assert torch.allclose(logits_of(folded), wanted, atol=2e-5 * float(wanted.abs().max()))
    kept = [norm.name for norm in made.kept]
    assert kept == (["norm.final"] if "lm_head" in source.structure.tied else [])
    assert all(
        bool((folded.get_submodule(norm.weight.module).weight == 1 - source.structure.family.norm_offset).all())
        for norm in norms_of(source.structure)
        if norm.name not in kept
    )


class Stub:
    """Stands for what the loss is made of, where nothing is scored."""

    pad_id = 0


def removal_of(norms: FakeNorms, structure: Structure, max_rise: float = 0.5, steps: int = 60) -> Removal:
    from llmsurgery.train.session import Session

    made = events_of(structure.layers, 2, (1, 1, 1), bool(norms.state.special))
    settings = RemovalSettings(0.0, 0.9, max_rise, steps)
    return Removal(Stub(), norms, [], made, settings, Session())  # type: ignore[arg-type]


def test_every_norm_goes_once_and_in_order(tiny: tuple[Any, FakeNorms]) -> None:
    _, norms = tiny
    removal = removal_of(norms, norms.structure)
    seen = []
    for step in range(15):
        removal.begin([0])
        seen.append(int(norms.state.fake.sum()))
        assert seen[-1] == seen[0] if step < 2 else seen[-1] >= seen[-2]
    removal.finish()
    assert bool(norms.state.fake.all())
    assert removal.fired.tolist() == [event.step for event in removal.events]


def test_special_positions_lose_their_constants_after_the_last_norm(sources: Any) -> None:
    source = sources("gpt2")
    norms = FakeNorms(source.model(), source.structure, END, special=True)
    removal = removal_of(norms, source.structure)
    seen = []
    for _ in range(28):
        removal.begin([0])
        seen.append((bool(norms.state.fake.all()), int(norms.state.ends.sum()), bool(norms.state.special)))
    removal.finish()
    # The last norm goes at step 11; two steps later the end tokens of three blocks, the first position ten after these.
    assert seen[10] == (False, 3, True)
    assert seen[11] == seen[12] == (True, 3, True)
    assert [ends for _, ends, _ in seen[13:16]] == [2, 1, 0]
    assert [special for _, _, special in seen[24:26]] == [True, False]


def test_events_wait_while_the_loss_is_high_and_what_is_left_is_an_error(tiny: tuple[Any, FakeNorms]) -> None:
    _, norms = tiny
    removal = removal_of(norms, norms.structure)
    for step in range(8):
        removal.begin([0])
        removal.losses[:2] = torch.tensor([1.0 if step < 3 else 9.0, 1.0])
    # The second event came at step 3, and the third waits.
    assert sum(fired >= 0 for fired in removal.fired.tolist()) == 2
    assert int(removal.delay) == 4
    with pytest.raises(DivergedError, match="8 of 10 switches") as caught:
        removal.finish()
    assert caught.value.exit_code == 9


def test_models_that_are_not_supported_are_refused(checkpoints: dict[str, Path]) -> None:
    for name, word in (("mixtral", "routed experts"), ("olmo2", "no norm before attention")):
        checkpoint = Checkpoint.open(checkpoints[name])
        structure = detect(checkpoint.config, checkpoint.tensors)
        with pytest.raises(UnsupportedError, match=word):
            Fakeln().plan(FakelnConfig(), structure)


def test_history_is_not_a_number_before_it_is_written(tiny: tuple[Any, FakeNorms]) -> None:
    _, norms = tiny
    removal = removal_of(norms, norms.structure, steps=4)
    removal.begin([0])
    rows = removal.history.tolist()
    assert rows[0] == norms.state.sigma[:, REST].tolist()
    assert all(math.isnan(value) for value in rows[1])
    assert json.dumps(rows[0])
