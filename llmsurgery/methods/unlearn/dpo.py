"""DPO for unlearning (IdkDPO): prefer "I do not know" to the forget answer; and TOFU's plain idk baseline.

Papers: "Direct Preference Optimization", arXiv 2305.18290; as an unlearning baseline in "TOFU: A Task of Fictitious
Unlearning for LLMs", arXiv 2401.06121.

With N = -sum over the answer tokens of log p, f the forget answer, w another answer to the same prompt, and ref the
model before training:

    variant=dpo   L_f = mean_i -(2 / beta) log sigmoid(beta ((N_f - N_f^ref) - (N_w - N_w^ref)))
    variant=idk   L_f = (sum N_w) / (sum n_w)
    L = forget_weight * L_f + retain_weight * (sum N_r) / (sum n_r)

over the forget rows of a step and one random retain row for each of them, drawn anew at every access. `idk` does not
look at the forget answer at all.

w is drawn at every access from `alternatives` template answers that each row is given at the start: of these the
reference is scored before the first step, one number each, and no second model is held. Rows differ in their
alternatives, so that the whole list of templates is used; `alternatives=0` gives every row the whole list.

What differs from the released codes:

- TOFU's own DPO loss is overwritten by a later line of its trainer and never trained with.
- The framework draws w from all 100 sentences of its list; here from the row's alternatives, see above. One fixed
  answer per row, or a short list, would make the model learn single sentences. `preset=paper` gives each row ten,
  one for each epoch.
- beta is 0.1, as in the framework's configuration; the default of its class is 1.
- The retain mean runs over the answer tokens of the whole step and not of each micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.losses import TOFU_TRAINING, encode_sets, train_loss
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
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.train.losses import RowLoss, Term
    from llmsurgery.train.scorer import Scorer
    from llmsurgery.train.trainable import Trainable


@dataclass(frozen=True)
class DpoConfig:
    """Hyperparameters of DPO; `llmsurgery methods dpo` prints them with their help."""

    variant: str = option("dpo", "dpo, or TOFU's idk: cross-entropy of the template answers alone", ("dpo", "idk"))
    beta: float = option(0.1, "how soon the slope fades, per nat of the preference", minimum=1e-6)
    templates: str = option("idk", TEMPLATES_HELP, shipped=TEMPLATE_LISTS)
    alternatives: int = option(8, "template answers per forget row, drawn from the list; 0: all", minimum=0)
    forget_weight: float = option(1.0, "weight of the forget loss (gamma)", minimum=0)
    retain_weight: float = option(1.0, "weight of the cross-entropy of retain rows (alpha)", minimum=0)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class DpoData:
    """Forget rows with template answers, and encoded retain rows."""

    rows: TemplateRows
    retain: list[Encoded]

    @property
    def forget(self) -> list[Encoded]:
        """The forget rows."""
        return self.rows.forget


def dpo_loss(
    forget: torch.Tensor, forget_ref: torch.Tensor, other: torch.Tensor, other_ref: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return -(2 / beta) log sigmoid(beta ((N_f - N_f^ref) - (N_w - N_w^ref))) per row [rows].

    Args:
        forget: N of the forget answers [rows].
        forget_ref: N of the same before training [rows].
        other: N of the alternative answers [rows].
        other_ref: N of the same before training [rows].
        beta: Inverse temperature.
    """
    from torch.nn.functional import logsigmoid

    return -(2 / beta) * logsigmoid(beta * ((forget - forget_ref) - (other - other_ref)))


@register
class Dpo:
    """DPO as a method of the toolkit."""

    spec = MethodSpec(
        name="dpo",
        task="unlearn",
        summary='prefer "I do not know" to the forget answer (IdkDPO), with retain rows; variant=idk: learn it alone',
        paper="Direct Preference Optimization, arXiv 2305.18290",
        needs=("forget", "retain"),
        export="plain",
        trained=True,
        until="forget.token_prob<=0.2x",
        sequences=2,
        # The demo's model speaks a few hundred words; it learns its own "I am not sure." and not a stranger's.
        demo_settings={"templates": "demo"},
        presets={"paper": {**TOFU_TRAINING, "alternatives": 10}},
    )
    config_type = DpoConfig

    def plan(self, config: DpoConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that training may move."""
        return trained_tensors(config.training, structure)

    def prepare(self, config: DpoConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> DpoData:
        """Encode the forget rows with their own and with template answers, and the retain rows."""
        limit = config.training.max_length
        rows = encode_with_templates(encoder, data["forget"], load_templates(config.templates), limit)
        return DpoData(rows, encode_sets(encoder, data, limit).retain)

    def loss(self, config: DpoConfig, operation: Operation, prepared: DpoData, trainable: Trainable) -> RowLoss:
        """Return the loss; the reference is scored here."""
        from llmsurgery.train.losses import Partners, RowLoss, retain_cross_entropy
        from llmsurgery.train.scorer import Scorer

        session, rows = operation.training, len(prepared.rows.forget)
        scorer = Scorer(trainable, operation.encoder.pad_id)
        forget = _preference(scorer, prepared.rows, config, operation)
        partners = Partners(len(prepared.retain), rows, config.training, session)
        retain = retain_cross_entropy(scorer, prepared.retain, partners, config.retain_weight)
        return RowLoss(rows, session, forget, retain, prepared.rows.record())

    def edit(self, config: DpoConfig, operation: Operation, prepared: DpoData) -> MethodResult:
        """Train, and return the adapters or weights as edits."""
        return train_loss(
            lambda trainable: self.loss(config, operation, prepared, trainable),
            self.plan(config, operation.structure),
            config.training,
            operation,
        )


def _preference(scorer: Scorer, rows: TemplateRows, config: DpoConfig, operation: Operation) -> Term:
    """Return the forget term of either variant."""
    from llmsurgery.train.losses import Term, TokenMean, label_counts

    session = operation.training
    count = min(config.alternatives or len(rows.templates), len(rows.templates))
    chosen = [session.random.sample(rows.templates, count) for _ in rows.forget]
    mean = TokenMean()
    drawn: dict[int, int] = {}

    def others(indices: Sequence[int]) -> list[Encoded]:
        return [rows.pair(i, chosen[i][drawn[i]]) for i in indices]

    def begin(indices: Sequence[int]) -> None:
        drawn.update({i: session.random.randrange(count) for i in indices})
        mean.begin(label_counts(others(indices)))

    def idk(indices: Sequence[int]) -> torch.Tensor:
        return mean(scorer.surprisals(others(indices)), len(indices))

    if config.variant == "idk":
        return Term(idk, config.forget_weight, begin)
    forget_ref = scorer.reference_surprisals(rows.forget, operation.progress)
    pairs = [rows.pair(i, text) for i, texts in enumerate(chosen) for text in texts]
    other_ref = scorer.reference_surprisals(pairs, operation.progress).view(-1, count)

    def preference(indices: Sequence[int]) -> torch.Tensor:
        numbers = list(indices)
        forget, other = scorer.surprisals([*(rows.forget[i] for i in indices), *others(indices)]).chunk(2)
        kept = other_ref[numbers, [drawn[i] for i in indices]]
        return dpo_loss(forget, forget_ref[numbers], other, kept, config.beta).mean()

    return Term(preference, config.forget_weight, begin)
