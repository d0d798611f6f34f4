"""PAT: narrow the residual stream while training, and fold what was trained into a smaller stock checkpoint.

Paper: "PAT: Pruning-Aware Tuning for Large Language Models", arXiv 2408.14721. With d the width, r the rank of an
operator, and x what the embedding, an attention or an MLP writes into the residual stream:

    z    = v * M * (x + L1 L0 x)                      L0 [r, d], L1 [d, r] and v [d] of each module; M [d] of all
    M    = 1 / (1 + exp(min(-tau w, 10))) + beta      w [d] learned, tau and beta from the step s and the horizon s0
    tau  = 1 / (1 - ln max(1, s) / ln s0 + 1e-6)      beta = max(0.5 - s / s0, 0)
    L    = L_rows + 10 |#(w >= 0) - k| / k + mean_{w > 0} (w - 0.5)^2 + mean_{w <= 0} (w + 0.5)^2
           + identity_weight * mean (L0 L0^T - I)^2

LoRA trains on the matrices of the blocks at the same time. At first M = 1 and L1 = 0: the model is the source. From
0.8 s0 on the gate stands still, and the weights adapt to it. At the end the k channels of the largest w stay, and all
is folded: what writes becomes (v * D W)[kept], what reads W[:, kept], norms take sqrt(d / k) and rms_norm_eps d / k,
config.json gets hidden_size and head_dim. The result is a plain checkpoint without anything beside it.

--hidden K says the width that is KEPT, --sparsity the share that goes; a quarter by default. K has to be a multiple of
the heads, which stock transformers asks for; padded=true stores another K in the next multiple. --calibration is what
it trains on: all tokens of plain text, the answers of questions and chats. --teacher trains on the source's own
distributions over these tokens in place of the tokens: the source is the model with its adapters and gates off.

Where the head is tied to the embedding, the embedding has the gate and no operator, so that the result stays tied;
untie=true gives it one and stores the head. Norms of queries and keys share rms_norm_eps; what that changes in them is
below the rounding of fp32. A cap on the logits does not see the width.

What differs from the released code (kriskrisliu/PAT_Pruning-Aware-Tuning), and why:

- Its merge leaves v out and does not change the epsilon; both are needed for the same logits.
- Its last gate is not the gate of the merge: channels of a small |w| jump. Here the last steps (`rounded`) train under
  the rounded gate, and a run that ends with over 2% of the gates undecided fails with exit code 6.
- The identity losses of all modules are averaged; there all but those of the last block are lost.
- The proxies have a step size of their own: at 5e-5 no gate of a short run comes to a decision. After 0.8 s0 they
  stand still; there the count goes on to move them.
- A mean over no channel is 0 and not NaN. The step counts optimizer steps.
- Widths go by head_dim in config.json, not by a table of intermediate sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import GateError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.narrowing import (
    GATED,
    OTHER_NORMS,
    WidthConfig,
    Widths,
    is_tied,
    narrowed_parameters,
    narrowed_tensors,
    require_narrowable,
    widths_of,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import TrainingConfig, option, trained_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit
    from llmsurgery.train.loop import TrainingResult
    from llmsurgery.train.scorer import Scorer
    from llmsurgery.train.trainable import Trainable
    from llmsurgery.train.width_gate import Place, WidthGate

MOST_UNDECIDED = 0.02
"""Share of the gates that may be undecided at the end."""

RECORD = "width.json"
"""File beside the result with the channels that were kept, the operators and the gates."""

JUMP = 0.05
"""Nats per token by which folding or rounding may change the loss without a notice."""


def _training() -> TrainingConfig:
    return TrainingConfig(
        rank=16, alpha=32.0, weight_decay=0.0, max_steps=300, batch_size=8, schedule="cosine", save_every=50
    )


@dataclass(frozen=True)
class PatConfig:
    """Hyperparameters of PAT; `llmsurgery methods pat` prints them with their help."""

    width: WidthConfig = field(default_factory=WidthConfig)
    operator_rank: int = option(64, "rank r of the operators, at most the width", minimum=1)
    kept: str = option(
        "learned", "which channels stay; what is not learned is there to compare with", ("learned", "random", "first")
    )
    horizon: int = option(
        0,
        "steps s0 in which the gates close; 0: a third of all steps, or 100 if these are fewer and there is room",
        minimum=0,
    )
    rounded: float = option(0.5, "share of the steps, the last, under the rounded gate", minimum=0, maximum=1)
    gate_lr: float | None = option(None, "step size of the proxies w; none: 6 / horizon", minimum=0)
    identity_weight: float = option(1.0, "weight of the identity loss; 0 leaves v at 1, too", minimum=0)
    teacher: bool = option(False, "train on the source's distributions; the option --teacher sets it")
    window: int = option(128, "tokens of a piece of plain text", minimum=8)
    samples: int = option(4096, "pieces of plain text at most", minimum=1)
    training: TrainingConfig = field(default_factory=_training)


@register
class Pat:
    """PAT as a method of the toolkit."""

    spec = MethodSpec(
        name="pat",
        task="prune",
        summary="narrow the residual stream by gates that are trained along with LoRA, and fold them away",
        paper="PAT: Pruning-Aware Tuning for Large Language Models, arXiv 2408.14721",
        needs=(),
        uses=("calibration",),
        export="plain",
        trained=True,
        demo_settings={"max_steps": 200},
        lr_scale=10.0,
        structured=True,
        roles=GATED,
        lacks=OTHER_NORMS,
        presets={
            "paper": {
                "operator_rank": 200,
                "horizon": 10000,
                "rounded": 0.0,
                "gate_lr": 5e-5,
                "window": 256,
                "rank": 20,
                "alpha": 4.0,
                "dropout": 0.05,
                "lr": 5e-5,
                "schedule": "cosine",
                "warmup_steps": 100,
                "weight_decay": 0.0,
                "clip": 0.3,
                "epochs": 3,
                "max_steps": 0,
                "batch_size": 128,
                "max_length": 256,
            }
        },
    )
    config_type = PatConfig

    def plan(self, config: PatConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that become smaller, and those that training moves.

        Raises:
            UnsupportedError: The model's norms do not allow it.
            UsageError: The width does not fit.
        """
        require_narrowable(structure)
        widths_of(config.width, structure)
        targets = [*narrowed_tensors(structure), *self.moved(config, structure)]
        return list({target.stored: target for target in targets}.values())

    def moved(self, config: PatConfig, structure: Structure) -> list[RoleTensor]:
        """Return the tensors that training moves; all others are only cut."""
        return trained_tensors(config.training, structure)

    def moved_beside(self, config: PatConfig, structure: Structure) -> int:
        """Return how many entries train beside the weights: gates and operators."""
        widths = widths_of(config.width, structure)
        ranks = operator_ranks(config, structure, widths).values()
        return widths.before * (1 + sum(2 * rank + 1 for rank in ranks if rank))

    def prepare(self, config: PatConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> list[Encoded]:
        """Encode what is trained on.

        Raises:
            InputError: A row is too long, or the plain text has less than one piece.
        """
        return training_rows(config, encoder, data["calibration"])

    def edit(self, config: PatConfig, operation: Operation, prepared: list[Encoded]) -> MethodResult:
        """Train gates, operators and adapters, and fold them into smaller tensors."""
        from llmsurgery.train.loop import planned_steps, train
        from llmsurgery.train.scorer import Scorer
        from llmsurgery.train.trainable import prepare_trainable
        from llmsurgery.train.width_loss import WidthLoss, source_states

        structure, session, training = operation.structure, operation.training, config.training
        widths = widths_of(config.width, structure)
        steps = max(1, planned_steps(training, len(prepared)))
        gate = make_gate(config, operation, widths, horizon_of(config, steps))
        with (
            prepare_trainable(operation.model, self.moved(config, structure), training, operation.read) as trainable,
            gate.attached(operation.model, structure),
        ):
            moving = with_gate(trainable, gate, config)
            scorer = Scorer(moving, operation.encoder.pad_id)
            teacher = source_states(scorer, prepared, gate, session) if config.teacher else None
            rounded_from = steps - round(config.rounded * steps)
            loss = WidthLoss(scorer, prepared, gate, rounded_from, session, config.identity_weight, teacher)
            result = train(moving, loss, len(prepared), training, session, loss.begin)
            losses = measured(operation, scorer, prepared, gate)
            require_decided(gate, result.steps)
            trained = trainable.edits()
        return folded(config, operation, widths, gate, trained, result, losses, prepared)


def training_rows(config: PatConfig, encoder: Encoder, rows: Sequence[Row]) -> list[Encoded]:
    """Return plain text in pieces of which every token counts, and other rows with their answers."""
    from llmsurgery.data.chat import Encoded
    from llmsurgery.data.windows import pack_windows

    asked = [encoder.encode(row, None, config.training.max_length) for row in rows if row.kind != "text"]
    texts = [row for row in rows if row.kind == "text"]
    if not texts:
        return asked
    length = min(config.window, encoder.max_length)
    windows = pack_windows(encoder, texts, length, config.samples, "calibration")
    return [*asked, *(Encoded(window, 1, False, "calibration") for window in windows)]


def operator_ranks(config: PatConfig, structure: Structure, widths: Widths) -> dict[Place, int]:
    """Return where operators stand and their ranks; a tied embedding has the gate alone."""
    rank = min(config.operator_rank, widths.before)
    ranks: dict[Place, int] = {("embed", None): rank if config.width.untie or not is_tied(structure) else 0}
    for layer in range(structure.layers):
        ranks |= {("attn", layer): rank, ("mlp", layer): rank}
    return ranks


def horizon_of(config: PatConfig, steps: int) -> int:
    """Return s0: gates need some dozens of steps to come to a decision, and stand still before they are rounded."""
    from llmsurgery.train.width_gate import SETTLED

    room = int((1 - config.rounded) * steps / SETTLED)
    return config.horizon or max(steps // 3, min(100, room))


def make_gate(config: PatConfig, operation: Operation, widths: Widths, horizon: int) -> WidthGate:
    """Return the gate of a run, on the model's device."""
    import torch

    from llmsurgery.train.width_gate import WidthGate

    fixed = None
    if config.kept != "learned":
        order = torch.arange(widths.before)
        if config.kept == "random":
            order = torch.randperm(widths.before, generator=torch.Generator().manual_seed(operation.seed))
        fixed = torch.zeros(widths.before, dtype=torch.bool).index_fill(0, order[: widths.keep], True)
        fixed = fixed.to(operation.model.device)
    ranks = operator_ranks(config, operation.structure, widths)
    gate = WidthGate(ranks, widths.before, widths.keep, horizon, config.identity_weight > 0, fixed)
    return gate.to(operation.model.device)


def with_gate(trainable: Trainable, gate: WidthGate, config: PatConfig) -> Trainable:
    """Return a model prepared for training with the gate and its operators among what moves."""
    lr = config.training.lr or 0.0
    gate_lr = 6 / gate.horizon if config.gate_lr is None else config.gate_lr
    parameters = [*trainable.parameters, *gate.moving()]
    factors = [1.0] * len(parameters)
    if gate.fixed is None:
        parameters.append(gate.proxy)
        factors.append(gate_lr / lr if lr else 1.0)
    return replace(trainable, parameters=parameters, factors=factors)


def measured(
    operation: Operation, scorer: Scorer, rows: Sequence[Encoded], gate: WidthGate
) -> dict[str, float]:  # fmt: skip
    """Return the loss on the first rows as the last step left the gate, and with gates of 0 and 1."""
    from llmsurgery.train.width_gate import Manner
    from llmsurgery.train.width_loss import measured_loss

    size = operation.training.micro_batch or 4
    manners = {"loss_last": gate.manner, "loss_rounded": Manner.ROUNDED}
    if gate.fixed is None and int((gate.proxy > 0).sum()) not in (0, gate.keep):
        # Where the count missed k, what rounding alone would give.
        manners["loss_positive"] = Manner.POSITIVE
    return {name: measured_loss(scorer, rows, gate, manner, size) for name, manner in manners.items()}


def require_decided(gate: WidthGate, steps: int) -> None:
    """Refuse gates that rounding would move.

    Raises:
        GateError: Too many of them.
    """
    undecided = gate.undecided()
    if undecided > MOST_UNDECIDED:
        raise GateError(
            f"{undecided:.0%} of the gates are undecided after {steps} steps",
            f"their proxies are within 0.05 of 0, and rounding would open and close them at will; {MOST_UNDECIDED:.0%} "
            "may be",
            f"raise the step size of the gates (--set gate_lr=..., {6 / gate.horizon:.2g} suits this horizon), or take "
            "more steps",
        )


def folded(
    config: PatConfig,
    operation: Operation,
    widths: Widths,
    gate: WidthGate,
    trained: Sequence[Edit],
    result: TrainingResult,
    losses: Mapping[str, float],
    rows: Sequence[Encoded],
) -> MethodResult:
    """Return the result of a trained gate."""
    from llmsurgery.edits.kinds import LowRank, Replace
    from llmsurgery.methods.narrowing import Narrowing, narrowed_edits, stored_channels

    indices, alive = stored_channels(gate.kept().cpu().numpy(), widths.stored)
    operators = {place: gate.operator(place) for place in gate.places if len(gate.operator(place).inner)}
    untied = config.width.untie and is_tied(operation.structure)
    narrowing = Narrowing(widths, indices, alive, operators, untied)
    changes = {edit.name: edit for edit in trained if isinstance(edit, LowRank | Replace)}
    gone = narrowed_parameters(narrowed_tensors(operation.structure), widths)
    total = sum(tensor.parameters for tensor in operation.structure.tensors)
    record = {
        **result.record(),
        "width": widths.before,
        "kept_width": widths.keep,
        "stored_width": widths.stored,
        "open_gates": int((gate.proxy > 0).sum()) if gate.fixed is None else widths.keep,
        "undecided_gates": gate.undecided(),
        "removed_parameters": gone,
        "removed_share_of_all": gone / total,
        **losses,
    }
    if losses["loss_rounded"] > losses["loss_last"] + JUMP:
        operation.progress.notice(
            f"rounding the gates raised the loss from {losses['loss_last']:.3f} to {losses['loss_rounded']:.3f}: "
            "a larger --set rounded=... lets the weights adapt to it"
        )
    beside = {RECORD: (json.dumps(described(gate, indices, alive), indent=2) + "\n").encode()}
    edits = narrowed_edits(operation, narrowing, changes)
    check = folding_check(operation, rows, losses["loss_rounded"])
    return MethodResult(edits, record, beside=beside, check=check)


def described(gate: WidthGate, indices: Any, alive: Any) -> dict[str, object]:
    """Return what a later look at the result may want: channels, proxies, and how far operators are from none."""
    import torch

    names = {("embed" if layer is None else f"{kind}.{layer}"): (kind, layer) for kind, layer in gate.places}
    operators = {name: gate.operator(place) for name, place in names.items()}
    with torch.no_grad():
        histogram = torch.histc(gate.proxy.float().cpu(), 20, -1, 1).int().tolist()
        distances = {name: float((o.outer @ o.inner).norm()) for name, o in operators.items() if len(o.inner)}
        scales = {name: [float(o.scale.min()), float(o.scale.max())] for name, o in operators.items()}
    return {
        "channels": [int(index) for index, living in zip(indices, alive, strict=True) if living],
        "stored_channels": [int(index) for index in indices],
        "proxies_from_minus_1_to_1": histogram,
        "operator_norms": distances,
        "scales": scales,
    }


def folding_check(
    operation: Operation, rows: Sequence[Encoded], expected: float
) -> Callable[[PreTrainedModel], None]:  # fmt: skip
    """Return what compares the stored result's loss with that of the gated model, and tells where they differ."""

    def check(model: PreTrainedModel) -> None:
        from llmsurgery.train.scorer import Scorer
        from llmsurgery.train.trainable import Trainable
        from llmsurgery.train.width_loss import MEASURED_ROWS, plain_loss

        scorer = Scorer(Trainable(model, [], None, list, None), operation.encoder.pad_id)
        found = plain_loss(scorer, rows[:MEASURED_ROWS], operation.training.micro_batch or 4)
        if abs(found - expected) > JUMP:
            operation.progress.notice(
                f"the stored result has a loss of {found:.3f} on the first rows of --calibration, the model in "
                f"training had {expected:.3f}: rounding to the stored dtype changed it"
            )

    return check
