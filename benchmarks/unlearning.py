"""Time and peak memory of a training step of each unlearning method, against the same loss written plainly.

    python -m benchmarks.unlearning MODEL [--only METHOD ...] [--cases CASE ...] [--repeats N]

The toolkit's side is the method's own code, its training loop included. The plain side is `benchmarks.plain_losses`: a
second copy of the model where the loss has a reference, all logits and their log-softmax in fp32, the same adapters on
the same rows with the same optimizer. Both must begin at the same loss. What the toolkit pays once before the first
step, such as scoring a reference, is measured apart.

Every measurement runs in a process of its own on one thread; the two sides alternate. `neuron-adjust` and `key-space`
do not train and are left out. `uoe` runs on a mixture of experts with random weights, because SmolLM2 has none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import write_result

if TYPE_CHECKING:
    import torch

    from benchmarks.training_setup import Clock, Loaded, Rows
    from llmsurgery.methods.base import Operation
    from llmsurgery.train.losses import RowLoss
    from llmsurgery.train.trainable import Factors, Trainable

STEPS = 3
"""Steps of a measurement; the first is not counted."""
METHODS = (
    "ga", "graddiff", "kl-min", "dpo", "npo", "simnpo", "rmu", "undial", "loku", "flat", "lat", "uld-assistant",
    "uld-distillation", "selective-amnesia", "uoe",
)  # fmt: skip
MORE = {"uld-assistant": ("whole",), "graddiff": ("lean",)}
"""Further sides: ULD's loss on an assistant with all blocks, and the toolkit's step under `lean_allocator`."""
TOLERANCE = 1e-3
"""How far the first losses of both sides may lie apart, relative to the larger of the loss and 1."""
REFERENCED = ("kl-min", "dpo", "npo", "rmu", "undial", "lat", "uld-distillation")
"""Losses that ask a model before training."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with its config and rows, on a loaded model."""

    name: str
    method: Any
    config: Any
    loaded: Loaded
    rows: Rows

    def prepared(self) -> Any:
        """Return what the method's `prepare` would make of the rows."""
        from llmsurgery.methods.losses import AnswerSets, base_loss
        from llmsurgery.methods.templates import TemplateRows
        from llmsurgery.methods.unlearn.dpo import DpoData
        from llmsurgery.methods.unlearn.lat import LatData
        from llmsurgery.methods.unlearn.loku import LokuData
        from llmsurgery.methods.unlearn.selective_amnesia import AmnesiaData
        from llmsurgery.methods.unlearn.uld import UldData
        from llmsurgery.methods.unlearn.uoe import UoeData

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
        from benchmarks.training_setup import InTurn
        from llmsurgery.methods.base import Operation
        from llmsurgery.run.operate import tensor_reader
        from llmsurgery.train.session import Session

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


def make_setting(model: Path, name: str, case: str) -> Setting:
    """Load the model and encode the rows."""
    from benchmarks.training_setup import CASES, SETTINGS, cut_rows, load
    from llmsurgery.compute.load import load_tokenizer
    from llmsurgery.data import GENERAL_TEXT
    from llmsurgery.data.records import read_rows
    from llmsurgery.methods.registry import find_method
    from llmsurgery.methods.settings import resolve_config

    loaded = load(model)
    size = CASES[case]
    if name == "uoe":
        ids = [(7919 * i) % 49152 for i in range(4096)]
    else:
        tokenizer = load_tokenizer(model)
        ids = tokenizer("\n".join(row.answer for row in read_rows(GENERAL_TEXT)))["input_ids"]
    method = find_method(name.partition("-")[0] if name.startswith("uld") else name)
    training = {"lr": 1e-4, "max_steps": STEPS, "batch_size": size.rows}
    given = {**training, **SETTINGS[name]}
    if name == "uld-assistant":
        given["assistant_batch_size"] = size.rows
    return Setting(name, method, resolve_config(method.config_type, given), loaded, cut_rows(ids, size))


def own_step(setting: Setting, whole: bool = False) -> dict[str, float]:
    """Measure the toolkit's step.

    Args:
        setting: The method.
        whole: Let ULD's assistant have all blocks of the model.
    """
    from benchmarks.training_setup import Clock
    from llmsurgery.compute.device import set_seeds

    set_seeds(0)
    clock = Clock(stage=1 if setting.name == "uld-distillation" else 0)
    operation = setting.operation(clock)
    if setting.name == "uld-assistant":
        record: Any = train_assistant(setting, operation, whole).record
    elif setting.name == "loku":
        record = _train_loku(setting, operation).record
    else:
        record = setting.method.edit(setting.config, operation, setting.prepared()).record
    return clock.result(setting.loaded, record["first_loss"])


def train_assistant(setting: Setting, operation: Operation, whole: bool = False) -> Any:
    """Train ULD's assistant as the method does."""
    from llmsurgery.data.mixture import Mixture
    from llmsurgery.train.assistant import AssistantLoss, assistant_layers, train_assistant
    from llmsurgery.train.assistant_config import assistant_training

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
    import torch

    generator = torch.Generator().manual_seed(0)
    rank = setting.config.training.rank
    start = {}
    for target in setting.method.plan(setting.config, setting.loaded.structure):
        outputs, inputs = target.shape
        left, right = (0.02 * torch.randn(shape, generator=generator) for shape in ((outputs, rank), (rank, inputs)))
        start[target.stored] = (left, right)
    return start


def _train_loku(setting: Setting, operation: Operation) -> Any:
    from llmsurgery.methods.losses import train_loss

    def make(trainable: Trainable) -> RowLoss:
        loss: RowLoss = setting.method.loss(setting.config, operation, setting.prepared(), trainable)
        return loss

    config = setting.config
    targets = setting.method.plan(config, setting.loaded.structure)
    return train_loss(make, targets, config.training, operation, _factors(setting))


def plain_step(setting: Setting) -> dict[str, float]:
    """Measure the same loss written plainly."""
    from benchmarks.plain_losses import Plain, second_copy
    from benchmarks.training_setup import Clock
    from llmsurgery.compute.device import set_seeds
    from llmsurgery.run.operate import tensor_reader
    from llmsurgery.train.trainable import prepare_trainable

    set_seeds(0)
    clock, loaded, config = Clock(), setting.loaded, setting.config
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
        first = _plain_loop(getattr(plain, setting.name.replace("-", "_")), trainable.parameters, training, clock)
    return clock.result(loaded, first)


def _extra(setting: Setting) -> Any:
    """Return what single losses need besides."""
    import copy

    from llmsurgery.methods.unlearn.lat import attacked_places
    from llmsurgery.methods.unlearn.rmu import control_direction, steered_block

    structure, config = setting.loaded.structure, setting.config
    if setting.name == "rmu":
        width = setting.loaded.model.lm_head.weight.shape[1]
        return {"block": steered_block(config, structure), "target": config.steering * control_direction(width, 0)}
    if setting.name == "lat":
        return {"places": attacked_places(config, structure)}
    if setting.name == "uld-distillation":
        from benchmarks.training_setup import Clock

        return copy.deepcopy(train_assistant(setting, setting.operation(Clock(stage=9))).model)
    return None


def _plain_assistant(setting: Setting) -> Any:
    """Return the first blocks as a model of its own, what moves of it, and how it is trained."""
    import copy

    from llmsurgery.train.assistant import assistant_layers, assistant_targets
    from llmsurgery.train.assistant_config import assistant_training

    loaded, config = setting.loaded, setting.config
    layers = assistant_layers(loaded.structure, config.assistant.assistant_layers)
    blocks = loaded.model.model.layers
    loaded.model.model.layers = blocks[:layers]
    model = copy.deepcopy(loaded.model)
    loaded.model.model.layers = blocks
    model.config.num_hidden_layers = layers
    training = assistant_training(config.assistant, config.training, len(setting.rows.forget), 576)
    return model, assistant_targets(loaded.structure, layers), training


def _residual(setting: Setting, model: Any, targets: Sequence[Any]) -> None:
    """Move the factors from the weights into the adapters, as LoKU does."""
    import torch

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
    import torch

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


def _plain_expert(setting: Setting, clock: Clock) -> dict[str, float]:
    """Measure UOE: the gradient of all experts, of which one slice reaches an fp32 copy that the optimizer moves."""
    import torch

    from benchmarks.plain_losses import Plain

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
    first = _plain_loop(plain.uoe, [*masters, block.gate.weight], config.training, clock, collect, write)
    return clock.result(setting.loaded, first)


def worker(model: Path, name: str, variant: str, case: str) -> dict[str, float]:
    """Measure one side of a method."""
    import torch

    from llmsurgery.compute.device import SMALL_MODEL, lean_allocator

    if variant == "lean":
        lean_allocator(SMALL_MODEL, torch.device("cpu"))
    if name == "uoe":
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "benchmarks.unlearning", folder, "--experts"], check=True)
            setting = make_setting(Path(folder), name, case)
            return plain_step(setting) if variant == "plain" else own_step(setting)
    setting = make_setting(model, name, case)
    return plain_step(setting) if variant == "plain" else own_step(setting, variant == "whole")


def compare(model: Path, name: str, case: str, repeats: int) -> dict[str, Any]:
    """Measure all sides of a method, one after the other and again.

    Raises:
        RuntimeError: The sides do not compute the same loss.
    """
    variants = ["toolkit", "plain", *(MORE.get(name, ()))]
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            words = [sys.executable, "-m", "benchmarks.unlearning", str(model), "--worker", name, variant, case]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
    first, other = (runs[variant][0]["first_loss"] for variant in ("toolkit", "plain"))
    if abs(first - other) > TOLERANCE * max(1.0, abs(other)):
        raise RuntimeError(f"{name}: the first loss is {first} here and {other} plainly")
    median = {
        variant: {key: statistics.median(run[key] for run in many) for key in many[0]} for variant, many in runs.items()
    }
    pairs = zip(runs["toolkit"], runs["plain"], strict=True)
    ratios = [own["cpu_seconds"] / plain["cpu_seconds"] for own, plain in pairs]
    row: dict[str, Any] = {
        "runs": runs,
        "median": median,
        "time_ratio": median["toolkit"]["cpu_seconds"] / median["plain"]["cpu_seconds"],
        "time_ratios": ratios,
        "memory_ratio": median["toolkit"]["peak_bytes"] / median["plain"]["peak_bytes"],
    }
    for side in MORE.get(name, ()):
        row[f"{side}_ratio"] = median[side]["cpu_seconds"] / median["toolkit"]["cpu_seconds"]
    print(f"{case} {name}: time {row['time_ratio']:.3f} {ratios}, memory {row['memory_ratio']:.3f}", file=sys.stderr)
    return row


def main() -> None:
    """Measure every method and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--cases", nargs="+", default=["short"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--remark", default="", help="what else ran on the machine")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "VARIANT", "CASE"))
    parser.add_argument("--experts", action="store_true", help="write the mixture of experts to MODEL")
    options = parser.parse_args()
    from benchmarks.training_setup import CASES, SETTINGS, make_experts
    from llmsurgery.compute.source import resolve_source

    if options.experts:
        make_experts(options.model)
        return
    if options.worker:
        name, variant, case = options.worker
        print(json.dumps(worker(options.model, name, variant, case)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    source = resolve_source(options.model)
    results: dict[str, dict[str, Any]] = {}
    for case in options.cases:
        results[case] = {}
        for name in options.only:
            results[case][name] = compare(source, name, case, options.repeats)
    write_result(
        "unlearning",
        {
            "model": options.model.name,
            "dtype": "float32",
            "threads": 1,
            "cores_used": len(os.sched_getaffinity(0)),
            "nice": os.nice(0),
            "remark": options.remark,
            "steps": STEPS,
            "cases": {name: dataclasses.asdict(CASES[name]) for name in options.cases},
            "settings": {name: SETTINGS[name] for name in options.only},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
