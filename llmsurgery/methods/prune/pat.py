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
  the rounded gate. With rounded=0 a run that ends with over 2% of the gates undecided fails with exit code 6.
- The identity losses of all modules are averaged; there all but those of the last block are lost.
- The proxies have a step size of their own: at 5e-5 no gate of a short run comes to a decision. After 0.8 s0 they
  stand still; there the count goes on to move them.
- A mean over no channel is 0 and not NaN. The step counts optimizer steps.
- Widths go by head_dim in config.json, not by a table of intermediate sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llmsurgery.errors import GateError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.folding import folded
from llmsurgery.methods.narrowing import is_tied, narrowed_tensors
from llmsurgery.methods.pruning import answers_and_text, tell_of_repeats
from llmsurgery.methods.registry import register
from llmsurgery.methods.widths import GATED, OTHER_NORMS, WidthConfig, Widths, require_narrowable, widths_of
from llmsurgery.train.config import TrainingConfig, option, trained_tensors

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.progress import Progress
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.train.scorer import Scorer
    from llmsurgery.train.trainable import Trainable
    from llmsurgery.train.width_gate import Place, WidthGate

PAPER_RANK = 200
"""Rank of the operators of models that are 4096 wide."""

GATE_PATH = 18.0
"""Steps of a proxy times their size over the horizon, by default: how far it can go."""

MOST_UNDECIDED = 0.02
"""Share of the gates that may be undecided when they are rounded."""


def _training() -> TrainingConfig:
    return TrainingConfig(
        rank=16, alpha=32.0, weight_decay=0.0, max_steps=300, batch_size=8, schedule="cosine", save_every=50
    )


@dataclass(frozen=True)
class PatConfig:
    """Hyperparameters of PAT; `llmsurgery methods pat` prints them with their help."""

    width: WidthConfig = field(default_factory=WidthConfig)
    operator_rank: int | None = option(
        None,
        "rank r of the operators, at most the width; none: the paper's 200, or a third of a narrower width",
        minimum=1,
    )
    kept: str = option(
        "learned", "which channels stay; what is not learned is there to compare with", ("learned", "random", "first")
    )
    horizon: int = option(
        0,
        "steps s0 in which the gates close; 0: a fifth of all steps, or 60 if these are fewer and there is room",
        minimum=0,
    )
    rounded: float = option(0.67, "share of the steps, the last, under the rounded gate", minimum=0, maximum=1)
    gate_lr: float | None = option(None, "step size of the proxies w; none: 18 / horizon", minimum=0)
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
                "operator_rank": PAPER_RANK,
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
        tell_of_repeats(operation, steps * min(training.batch_size, len(prepared)) / len(prepared))
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
            loss.settle()
            losses = measured(operation, scorer, prepared, gate)
            require_decided(gate, gate_step(config, gate.horizon), result.steps, operation.progress)
            trained = trainable.edits()
        return folded(config.width.untie, operation, widths, gate, trained, result, losses, prepared)


def training_rows(config: PatConfig, encoder: Encoder, rows: Sequence[Row]) -> list[Encoded]:
    """Return plain text in pieces of which every token counts, and other rows with their answers."""
    from llmsurgery.data.windows import pack_windows

    length = min(config.window, encoder.max_length)
    return answers_and_text(
        encoder,
        rows,
        config.training.max_length,
        lambda texts: pack_windows(encoder, texts, length, config.samples, "calibration"),
    )


def operator_ranks(config: PatConfig, structure: Structure, widths: Widths) -> dict[Place, int]:
    """Return where operators stand and their ranks; a tied embedding has the gate alone."""
    rank = min(config.operator_rank or min(PAPER_RANK, max(1, widths.before // 3)), widths.before)
    ranks: dict[Place, int] = {("embed", None): rank if config.width.untie or not is_tied(structure) else 0}
    for layer in range(structure.layers):
        ranks |= {("attn", layer): rank, ("mlp", layer): rank}
    return ranks


def horizon_of(config: PatConfig, steps: int) -> int:
    """Return s0: gates need some dozens of steps to come to a decision, and stand still before they are rounded."""
    from llmsurgery.train.width_gate import SETTLED

    room = int((1 - config.rounded) * steps / SETTLED)
    return config.horizon or max(2, min(max(steps // 5, 60), room))


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


def gate_step(config: PatConfig, horizon: int) -> float:
    """Return the step size of the proxies."""
    return GATE_PATH / horizon if config.gate_lr is None else config.gate_lr


def with_gate(trainable: Trainable, gate: WidthGate, config: PatConfig) -> Trainable:
    """Return a model prepared for training with the gate and its operators among what moves."""
    lr = config.training.lr or 0.0
    gate_lr = gate_step(config, gate.horizon)
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


def require_decided(gate: WidthGate, step_size: float, steps: int, progress: Progress) -> None:
    """Refuse gates that rounding would move, and tell of those that it has moved before the last steps.

    Args:
        gate: The trained gate.
        step_size: That of its proxies.
        steps: Steps taken.
        progress: Told of the latter.

    Raises:
        GateError: Too many of them, and no step under the rounded gate.
    """
    from llmsurgery.train.width_gate import Manner

    undecided = gate.undecided()
    if undecided <= MOST_UNDECIDED:
        return
    what = f"{undecided:.0%} of the gates are undecided after {steps} steps"
    larger = max(GATE_PATH / gate.horizon, 2 * step_size)
    fix = f"raise the step size of the gates (--set gate_lr={larger:.2g}, it was {step_size:.2g})"
    if gate.manner is Manner.SOFT:
        raise GateError(
            what,
            f"their proxies are within 0.05 of 0, and rounding opens and closes them at once; {MOST_UNDECIDED:.0%} "
            "may be",
            f"{fix}, take more steps, or train the last of them under the rounded gate (--set rounded=0.67)",
        )
    progress.notice(f"{what}: among these the order of their proxies has chosen; to change that, {fix}")
