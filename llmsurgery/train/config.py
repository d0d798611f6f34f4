"""The hyperparameters every trained method shares. No heavy import: `llmsurgery methods` reads this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmsurgery.arch.spec import LINEAR_ROLES, RoleTensor, Structure
from llmsurgery.errors import UsageError

OPTIMIZERS = ("adamw", "adamw8bit", "lion")


def option(
    default: object,
    help: str,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    shipped: tuple[str, ...] = (),
) -> Any:
    """Declare one hyperparameter of a config dataclass.

    Args:
        default: Default value; the field's annotation is the type that `--set` converts to.
        help: One line for `llmsurgery methods NAME`.
        choices: The allowed values, if they are few.
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        shipped: Of a text that names a file: the names of what is shipped, which are no paths.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "shipped": shipped}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainingConfig:
    """How a trained method moves weights.

    Fields are documented by their `help` metadata, which `llmsurgery methods NAME` prints.
    """

    train: str = option("lora", "what moves: adapters, or the weights of `roles` themselves", ("lora", "full"))
    roles: tuple[str, ...] = option(
        ("linear",),
        "roles that move; `linear`: every matrix of a block but routed experts, `mlp` or `attention`: its part, "
        "`all`: every weight",
    )
    layers: tuple[int, ...] = option((), "layers that move; empty: all")
    experts: tuple[int, ...] = option(
        (), "numbers of the routed experts that move, where `roles` names them; empty: all"
    )
    rank: int = option(8, "rank of the adapters", minimum=1, maximum=65536)
    alpha: float = option(16.0, "scale of the adapters is alpha / rank", minimum=0)
    dropout: float = option(0.0, "dropout on the adapters' inputs", minimum=0, maximum=1)
    optimizer: str = option(
        "adamw",
        "adamw8bit holds the moments in 8 bits (bitsandbytes), which pays with train=full; lion needs a smaller step",
        OPTIMIZERS,
    )
    lr: float | None = option(
        None, "step size of AdamW; none: chosen by the model's width, `train` and the guard", minimum=0
    )
    weight_decay: float = option(0.01, "decoupled weight decay", minimum=0)
    max_steps: int = option(200, "optimizer steps at most; 0: as many as `epochs` says", minimum=0)
    epochs: int = option(0, "passes over the forget rows; 0: as many as `max_steps` says", minimum=0)
    batch_size: int = option(4, "forget rows per optimizer step; --batch-size sets the rows per forward", minimum=1)
    schedule: str = option("constant", "step size over time", ("constant", "linear", "cosine"))
    warmup_steps: int = option(0, "steps of linear warm-up; -1: one epoch, at least 2", minimum=-1)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", minimum=0)
    max_length: int = option(512, "longest row in tokens", minimum=8)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    save_every: int = option(20, "steps between kept states, which --resume goes on from; 0: keep none", minimum=0)
    check_every: int = option(
        0, "steps between checks of --until; 0: as often as checks cost about as much as steps", minimum=0
    )


@dataclass(frozen=True)
class GuardConfig:
    """Protection of what is not to change; `--set guard.NAME=VALUE`."""

    prompts: int = option(400, "questions drawn from the model itself", minimum=1)
    same_form: float = option(
        0.85, "share of them that are a forget question with another subject", minimum=0, maximum=1
    )
    question_tokens: int = option(24, "longest drawn question in tokens", minimum=4)
    answer_tokens: int = option(24, "longest protected answer in tokens", minimum=1)
    batch_size: int = option(8, "protected answers per step", minimum=1)
    weight: float = option(1.0, "weight of the divergence against the method's loss", minimum=0)


def trained_tensors(config: TrainingConfig, structure: Structure) -> list[RoleTensor]:
    """Return the stored tensors that `roles`, `layers` and `experts` choose.

    Args:
        config: Training hyperparameters.
        structure: The checkpoint's roles.

    Raises:
        UsageError: An unknown role, layer or expert, or adapters on what is not a matrix of a block.
        NoEffectError: Nothing is chosen.
    """
    targets = structure.select(config.roles, config.layers or None, config.experts or None)
    require_trainable_roles(targets, config)
    return targets


def suitable_lr(width: int, train: str, guarded: bool = False) -> float:
    """Return a step size that suits a model of some width.

    Without a guard 1e-4 for adapters, which works from 576 up; narrow models need larger steps. Under a guard 8e-4,
    because it holds back what such steps would spoil: on SmolLM2 the same forgetting takes a sixth of the steps and
    costs its neighbours no more. Above 576 it falls with the root of the width. A tenth of it where the weights
    themselves move. Tuned on the demo (128) and on SmolLM2 (576), `benchmarks/` has the figures; wider models are not
    measured.

    Args:
        width: Width of the residual stream.
        train: "lora" or "full".
        guarded: Whether answers are protected during training.
    """
    lr = 8e-4 * min(1.0, 576 / width) ** 0.5 if guarded else 1e-4 * max(1.0, 576 / width)
    return float(f"{lr if train == 'lora' else lr / 10:.2g}")


def require_trainable_roles(targets: Sequence[RoleTensor], config: TrainingConfig) -> None:
    """Refuse adapters on tensors that are not matrices of a block.

    Raises:
        UsageError: Names the role and the way out.
    """
    if config.train == "lora" and (other := sorted({t.role for t in targets} - set(LINEAR_ROLES))):
        raise UsageError(
            f"adapters cannot be put on {', '.join(other)}",
            f"LoRA goes on the matrices of the blocks: {', '.join(LINEAR_ROLES)}",
            "choose other roles, or train the weights themselves with --set train=full",
        )
