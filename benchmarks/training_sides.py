"""Both sides of `benchmarks.unlearning`: a step as the toolkit takes it, and the same loss written plainly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_losses import Plain, second_copy
from benchmarks.training_setup import CASES, SETTINGS, STEPS, Clock, InTurn, Loaded, Rows, cut_rows
from llmsurgery.compute.device import SMALL_MODEL, lean_allocator, resident_bytes, set_seeds
from llmsurgery.compute.load import load_tokenizer
from llmsurgery.data import GENERAL_TEXT
from llmsurgery.data.mixture import Mixture
from llmsurgery.data.records import read_rows
from llmsurgery.methods.base import Operation
from llmsurgery.methods.losses import AnswerSets, base_loss, train_loss
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import resolve_config
from llmsurgery.methods.templates import TemplateRows
from llmsurgery.methods.unlearn.dpo import DpoData
from llmsurgery.methods.unlearn.lat import LatData, attacked_places
from llmsurgery.methods.unlearn.loku import LokuData
from llmsurgery.methods.unlearn.rmu import control_direction, steered_block
from llmsurgery.methods.unlearn.selective_amnesia import AmnesiaData
from llmsurgery.methods.unlearn.uld import UldData
from llmsurgery.methods.unlearn.uoe import UoeData
from llmsurgery.run.source import tensor_reader
from llmsurgery.train.assistant import AssistantLoss, assistant_layers, assistant_targets, train_assistant
from llmsurgery.train.assistant_config import assistant_training
from llmsurgery.train.losses import RowLoss
from llmsurgery.train.session import Session
from llmsurgery.train.trainable import Factors, Trainable, prepare_trainable

REFERENCED = ("kl-min", "dpo", "npo", "rmu", "undial", "lat", "uld-distillation")
"""Losses that ask a model before training."""


@dataclass(frozen=True)
class Setting:
    """A method with its config and rows, on a loaded model."""

    name: str
    method: Any
    config: Any
    loaded: Loaded
    rows: Rows

    def prepared(self) -> Any:
        """Return what the method's `prepare` would make of the rows."""
        forget, other, retain = self.rows.forget, self.rows.other, self.rows.retain
        sets = AnswerSets(forget, retain)
        pairs = TemplateRows(forget, ["other"], lambda index, _: other[index], [None] * len(forget))
        if self.name == "uoe":
            config = self.config
            return UoeData(base_loss(config.base, config.base_settings, config.training), sets, forget)
        return {
            "dpo": DpoData(pairs, retain),
            "flat": pairs,
            "lat": LatData(forget, retain, pairs),
            "loku": LokuData(sets),
            "selective-amnesia": AmnesiaData(sets, [], 0),
            "uld-distillation": UldData(forget, [], other, retain, [], {}, False),
        }.get(self.name, sets)

    def operation(self, clock: Clock) -> Operation:
        """Return what a method is given."""
        session = Session(progress=clock)
        session.random = InTurn()
        loaded = self.loaded
        return Operation(
            loaded.structure,
            loaded.checkpoint.config,
            tensor_reader(loaded.checkpoint),
            loaded.model,
            loaded.encoder,
            {},
            0,
            clock,
            session,
        )


def make_setting(loaded: Loaded, tokenizer: Path | None, name: str, case: str) -> Setting:
    """Settle the config and cut the rows; without a tokenizer they are made of numbers."""
    size = CASES[case]
    if tokenizer is None:
        ids = [7919 * number % loaded.model.config.vocab_size for number in range(4096)]
    else:
        text = "\n".join(row.answer for row in read_rows(GENERAL_TEXT))
        ids = list(load_tokenizer(tokenizer)(text)["input_ids"])
    method = find_method(name.partition("-")[0] if name.startswith("uld") else name)
    training = {"lr": 1e-4, "max_steps": STEPS, "batch_size": size.rows}
    given = {**training, **SETTINGS[name]}
    if name == "uld-assistant":
        given["assistant_batch_size"] = size.rows
    return Setting(name, method, resolve_config(method.config_type, given), loaded, cut_rows(ids, size))


def own_step(setting: Setting, clock: Clock, whole: bool = False) -> float:
    """Take the toolkit's steps and return the first loss.

    Args:
        setting: The method.
        clock: Measures.
        whole: Let ULD's assistant have all blocks of the model.
    """
    set_seeds(0)
    clock.stage = int(setting.name == "uld-distillation")
    operation = setting.operation(clock)
    if setting.name == "uld-assistant":
        record: Any = assistant_of(setting, operation, whole).record
    elif setting.name == "loku":
        record = _train_loku(setting, operation).record
    else:
        record = setting.method.edit(setting.config, operation, setting.prepared()).record
    return float(record["first_loss"])


def assistant_of(setting: Setting, operation: Operation, whole: bool = False) -> Any:
    """Train ULD's assistant as the method does."""
    rows, own, loaded = setting.rows, setting.config.assistant, setting.loaded
    mixture = Mixture({"forget": rows.forget, "retain": rows.retain, "perturbed": rows.other}, 0)
    width = loaded.model.get_input_embeddings().weight.shape[1]
    training = assistant_training(own, setting.config.training, len(mixture), width)
    loss = partial(AssistantLoss, mixture=mixture, beta=own.beta, answer_only=False, pad_id=loaded.encoder.pad_id)
    layers = loaded.structure.layers if whole else assistant_layers(loaded.structure, own.assistant_layers)
    return train_assistant(
        loaded.model, loaded.structure, layers, loss, training, operation.read, operation.training
    )  # fmt: skip


def _factors(setting: Setting) -> dict[str, Factors]:
    """Return random factors for adapters to start from, in the place of FILA's, whose search is no part of a step."""
    generator = torch.Generator().manual_seed(0)
    rank = setting.config.training.rank
    start = {}
    for target in setting.method.plan(setting.config, setting.loaded.structure):
        outputs, inputs = target.shape
        left, right = (0.02 * torch.randn(shape, generator=generator) for shape in ((outputs, rank), (rank, inputs)))
        start[target.stored] = (left, right)
    return start


def _train_loku(setting: Setting, operation: Operation) -> Any:
    """Train LoKU, but for the search of its start."""

    def make(trainable: Trainable) -> RowLoss:
        loss: RowLoss = setting.method.loss(setting.config, operation, setting.prepared(), trainable)
        return loss

    config = setting.config
    targets = setting.method.plan(config, setting.loaded.structure)
    return train_loss(make, targets, config.training, operation, _factors(setting))


def plain_step(setting: Setting, clock: Clock) -> float:
    """Take steps on the same loss written plainly and return the first one."""
    set_seeds(0)
    loaded, config = setting.loaded, setting.config
    if setting.name == "uoe":
        return _plain_expert(setting, clock)
    reference = second_copy(loaded) if setting.name in REFERENCED else None
    model, training = loaded.model, config.training
    extra = _extra(setting)
    targets = setting.method.plan(config, loaded.structure)
    if setting.name == "uld-assistant":
        model, targets, training = _plain_assistant(setting)
    with prepare_trainable(model, targets, training, tensor_reader(loaded.checkpoint)) as trainable:
        if setting.name == "loku":
            _residual(setting, model, targets)
        plain = Plain(model, reference, setting.rows, config, extra)
        return _plain_loop(getattr(plain, setting.name.replace("-", "_")), trainable.parameters, training, clock)


def _extra(setting: Setting) -> Any:
    """Return what single losses need besides."""
    structure, config = setting.loaded.structure, setting.config
    if setting.name == "rmu":
        width = setting.loaded.model.lm_head.weight.shape[1]
        return {"block": steered_block(config, structure), "target": config.steering * control_direction(width, 0)}
    if setting.name == "lat":
        return {"places": attacked_places(config, structure)}
    if setting.name == "uld-distillation":
        return copy.deepcopy(assistant_of(setting, setting.operation(Clock(stage=9))).model)
    return None


def _plain_assistant(setting: Setting) -> Any:
    """Return the first blocks as a model of its own, what moves of it, and how it is trained."""
    loaded, config = setting.loaded, setting.config
    layers = assistant_layers(loaded.structure, config.assistant.assistant_layers)
    blocks = loaded.model.model.layers
    loaded.model.model.layers = blocks[:layers]
    model = copy.deepcopy(loaded.model)
    loaded.model.model.layers = blocks
    model.config.num_hidden_layers = layers
    training = assistant_training(config.assistant, config.training, len(setting.rows.forget), model.config.hidden_size)
    return model, assistant_targets(loaded.structure, layers), training


def _residual(setting: Setting, model: Any, targets: Sequence[Any]) -> None:
    """Move the factors from the weights into the adapters, as LoKU does."""
    start = _factors(setting)
    with torch.no_grad():
        for target in targets:
            layer, (left, right) = model.get_submodule(target.module), start[target.stored]
            layer.lora_B["default"].weight.copy_(left)
            layer.lora_A["default"].weight.copy_(right)
            layer.base_layer.weight -= layer.scaling["default"] * left @ right


def _nothing() -> None:
    """Do nothing around a step."""


def _plain_loop(
    loss: Callable[[], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    training: Any,
    clock: Clock,
    collect: Callable[[], None] = _nothing,
    write: Callable[[], None] = _nothing,
) -> float:
    """Take the steps and return the first loss."""
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
    losses = []
    with clock.task("training", STEPS) as tick:
        for _ in range(STEPS):
            value = loss()
            torch.autograd.backward(value)
            collect()
            torch.nn.utils.clip_grad_norm_(parameters, training.clip)
            optimizer.step()
            optimizer.zero_grad()
            write()
            losses.append(value.item())
            tick()
    return losses[0]


def _plain_expert(setting: Setting, clock: Clock) -> float:
    """Take steps of UOE: of the gradient of all experts one slice reaches an fp32 copy, which the optimizer moves."""
    model, config = setting.loaded.model, setting.config
    (layer,), (expert,) = config.training.layers, config.training.experts
    block = model.model.layers[layer].mlp
    fused = [block.experts.gate_up_proj, block.experts.down_proj]
    masters = [torch.nn.Parameter(each.detach()[expert].clone()) for each in fused]
    for each in (*fused, block.gate.weight):
        each.requires_grad_(True)

    def collect() -> None:
        for master, each in zip(masters, fused, strict=True):
            master.grad, each.grad = each.grad[expert].clone(), None

    def write() -> None:
        with torch.no_grad():
            for master, each in zip(masters, fused, strict=True):
                each[expert] = master

    model.train()
    plain = Plain(model, None, setting.rows, config, {"router": block.gate, "expert": expert})
    return _plain_loop(plain.uoe, [*masters, block.gate.weight], config.training, clock, collect, write)


def measure(setting: Setting, side: str, wait: Callable[[], None]) -> dict[str, Any]:
    """Measure one side of a method in this process.

    Args:
        setting: The method.
        side: "plain", "toolkit", "lean" or "whole".
        wait: Called between steps; returns when this side is to go on.
    """
    model = setting.loaded.model
    if side == "lean":
        # As a run of a trained method begins.
        lean_allocator(SMALL_MODEL, model.device)
    # Code that has not run yet is not in memory yet, and belongs to neither side.
    states = model.get_input_embeddings().weight[None, :2].detach().requires_grad_()
    model(inputs_embeds=states).logits.sum().backward()
    clock = Clock(wait=wait, resident=resident_bytes())
    first = plain_step(setting, clock) if side == "plain" else own_step(setting, clock, side == "whole")
    return clock.result(first)
