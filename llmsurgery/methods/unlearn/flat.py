"""FLAT: forget with only forget data, by an f-divergence between a template answer and the forget answer.

Paper: "LLM Unlearning via Loss Adjustment with Only Forget Data", arXiv 2410.11143 (ICLR 2025).

For a forget row with prompt x and answer y_f, and a template answer y_e drawn anew at every access:

    p(y)  = mean over the answer tokens, the one end token included, of softmax(z)[y_t]      (a probability)
    L     = -g(p(y_e)) + f*(g(p(y_f)))                                                       per row, then averaged

with g the activation and f* the conjugate of the divergence:

    tv        L = (tanh p_f - tanh p_e) / 2
    js        L = softplus(-p_e) + softplus(p_f) - 2 log 2
    pearson   L = -p_e + p_f + p_f^2 / 4
    kl        L = -p_e + exp(p_f - 1)

Every loss falls in p_e and rises in p_f on [0, 1] and is bounded there.

What differs from the released code (UCSC-REAL/FLAT), and the switch that brings it back:

- Its token mean runs over the padded length, so that scores shrink tenfold and the divergences become nearly alike.
  Here the mean runs over the answer; `averaging=padded` reproduces the released one, with `max_length` as the length
  that rows are padded to.
- It applies g and f* to the batch mean, so that results depend on the batch size. Here they apply per row;
  `reduction=batch` reproduces the released one.
- Its reverse-KL, squared-Hellinger and Neyman use exp(+v) and push the wrong way. `reverse-kl`, `hellinger` and
  `neyman` are repaired forms of this project, not validated by the authors; its Jeffrey polynomial is left out.
- A third-party port averages log-probabilities, which is another, unbounded method; the score here is a probability.
- In its book path the "good" row is unrelated text. Here prompt + template is always a sequence of its own.
- Its constants `eps` and `smooth_rate` have no effect and do not exist here.

The paper trains all weights (`preset=paper`); the default trains LoRA adapters, folded into the stored weights in
float64 and rounded once. There is no retain term: neighbours of the forget set can move, which the report shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.losses import train_loss
from llmsurgery.methods.registry import register
from llmsurgery.methods.templates import (
    TEMPLATE_LISTS,
    TEMPLATES_HELP,
    TemplateRows,
    encode_with_templates,
    load_templates,
)
from llmsurgery.train.config import TrainingConfig, option, trained_tensors

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.train.losses import RowLoss
    from llmsurgery.train.trainable import Trainable

DIVERGENCES = ("tv", "js", "pearson", "kl", "reverse-kl", "hellinger", "neyman")


@dataclass(frozen=True)
class FlatConfig:
    """Hyperparameters of FLAT; `llmsurgery methods flat` prints them with their help."""

    divergence: str = option(
        "tv", "f-divergence; reverse-kl, hellinger and neyman are this project's repaired forms", DIVERGENCES
    )
    averaging: str = option(
        "answer", "mean over answer tokens, or over the padded length as released", ("answer", "padded")
    )
    reduction: str = option("sample", "divergence per row, or of the batch mean as released", ("sample", "batch"))
    templates: str = option("idk", TEMPLATES_HELP, shipped=TEMPLATE_LISTS)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def divergence_loss(name: str, p_e: torch.Tensor, p_f: torch.Tensor) -> torch.Tensor:
    """Return -g(p_e) + f*(g(p_f)) elementwise.

    Args:
        name: One of `DIVERGENCES`.
        p_e: Scores of the template answers, in [0, 1].
        p_f: Scores of the forget answers, in [0, 1].

    Returns:
        Losses of the same shape and dtype.
    """
    import math

    from torch.nn.functional import softplus

    if name == "tv":
        return (p_f.tanh() - p_e.tanh()) / 2
    if name == "js":
        return softplus(-p_e) + softplus(p_f) - 2 * math.log(2)
    if name == "pearson":
        return -p_e + p_f + p_f.square() / 4
    if name == "kl":
        return -p_e + (p_f - 1).exp()
    if name == "reverse-kl":
        return (-p_e).exp() + p_f - 1
    if name == "hellinger":
        return (-p_e).exp() + p_f.exp() - 2
    # Neyman: -g(p_e) = exp(-p_e) - 1 and f*(g(p_f)) = 2 - 2 exp(-p_f / 2).
    return (-p_e).exp() + 1 - 2 * (-p_f / 2).exp()


def flat_loss(
    token_probabilities: torch.Tensor, rows: torch.Tensor, count: int, config: FlatConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of a batch of `count` pairs.

    Args:
        token_probabilities: Probability of every labelled token [tokens]; rows 0 to count - 1 hold the forget answers,
            rows count to 2 count - 1 the template answers of the same prompts.
        rows: Row number of each token [tokens].
        count: Number of pairs.
        config: Divergence, averaging and reduction.

    Returns:
        Mean loss [], scores of the forget answers [count], scores of the template answers [count].
    """
    from llmsurgery.train.pooling import row_means, row_sums

    if config.averaging == "padded":
        # Position t - 1 predicts token t, so a row padded to max_length has max_length - 1 token losses.
        scores = row_sums(token_probabilities, rows, 2 * count) / (config.training.max_length - 1)
    else:
        scores = row_means(token_probabilities, rows, 2 * count)
    p_f, p_e = scores[:count], scores[count:]
    if config.reduction == "batch":
        return divergence_loss(config.divergence, p_e.mean(), p_f.mean()), p_f, p_e
    return divergence_loss(config.divergence, p_e, p_f).mean(), p_f, p_e


@register
class Flat:
    """FLAT as a method of the toolkit."""

    spec = MethodSpec(
        name="flat",
        task="unlearn",
        summary="forget with only forget data: trade the answer for a template answer under a bounded f-divergence",
        paper="LLM Unlearning via Loss Adjustment with Only Forget Data, arXiv 2410.11143",
        needs=("forget",),
        export="plain",
        trained=True,
        until="forget.token_prob<=0.2x",
        sequences=2,
        # The demo's model speaks a few hundred words; it learns its own "I am not sure." and not a stranger's.
        demo_settings={"templates": "demo"},
        presets={
            "paper": {
                "train": "full",
                "roles": ("all",),
                "lr": 1e-5,
                "epochs": 5,
                "max_steps": 0,
                "batch_size": 64,
                "schedule": "linear",
                "warmup_steps": -1,
                "weight_decay": 0.01,
                "max_length": 512,
            }
        },
    )
    config_type = FlatConfig

    def plan(self, config: FlatConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that training may move."""
        return trained_tensors(config.training, structure)

    def prepare(self, config: FlatConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> TemplateRows:
        """Encode the forget rows with their own and with every template answer."""
        return encode_with_templates(
            encoder, data["forget"], load_templates(config.templates), config.training.max_length
        )

    def loss(
        self, config: FlatConfig, operation: Operation, prepared: TemplateRows, trainable: Trainable
    ) -> RowLoss:  # fmt: skip
        """Return the loss; it has no retain term."""
        from llmsurgery.compute.head import batch_log_probabilities
        from llmsurgery.data.collate import collate
        from llmsurgery.train.losses import RowLoss, Term

        session = operation.training
        drawn: dict[int, str] = {}

        def begin(indices: Sequence[int]) -> None:
            # One template per access, as in the paper, not one per row for good.
            drawn.update({i: session.random.choice(prepared.templates) for i in indices})

        def value(indices: Sequence[int]) -> torch.Tensor:
            rows = [prepared.forget[i] for i in indices]
            rows += [prepared.pair(i, drawn[i]) for i in indices]
            batch = collate(rows, operation.encoder.pad_id, operation.model.device)
            scores, owners = batch_log_probabilities(
                operation.model, batch.input_ids, batch.attention_mask, batch.label_mask, trainable.autocast
            )
            mean, p_forget, p_template = flat_loss(scores.exp(), owners, len(indices), config)
            session.observe(
                p_forget_median=float(p_forget.detach().median()),
                p_template_median=float(p_template.detach().median()),
            )
            return mean

        return RowLoss(len(prepared.forget), session, Term(value, begin=begin), facts=prepared.record())

    def edit(self, config: FlatConfig, operation: Operation, prepared: TemplateRows) -> MethodResult:
        """Train, and return the adapters or weights as edits."""
        return train_loss(
            lambda trainable: self.loss(config, operation, prepared, trainable),
            self.plan(config, operation.structure),
            config.training,
            operation,
        )
