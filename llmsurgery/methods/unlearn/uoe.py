"""UOE (SEUF): unlearn one expert of a mixture of experts and the router of its block, under any unlearning loss.

Paper: "SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?", first called "UOE: Unlearning One Expert Is
Enough For Mixture-of-experts LLMs", arXiv 2411.18797 (ACL 2025). No code was published.

Unlearning all of such a model lets its routers dodge: forget tokens move to experts that never held the knowledge, the
forget loss falls, and what these experts did is lost. So only the expert that forget rows use most moves, with the
router of its block, and an anchor keeps sending forget tokens to it.

1. Attribution, on the source model. With s_t the probabilities of a router over its E experts at token t, and
   g_{i,t} = s_{i,t} where expert i is among the chosen ones and 0 elsewhere:

       affinity_i = mean over forget rows of the mean over their tokens of g_{i,t}

   The expert e* with the highest affinity of all blocks is the target, in block l*.
2. Training moves its gate, up and down matrices and the router's weight. With a_i = 1 for i = e* and 0 elsewhere:

       L = base loss + anchor_weight * mean over forget tokens of sum_i (s_{i,t} - a_i)^2

`base` names the method whose loss is wrapped, for example `graddiff`, `npo`, `flat` or `rmu`; `base_settings` are its
hyperparameters. A loss on a block's output with no block named (`rmu`) is put on l*.

Choices of this project:

- The paper defines g twice: masked to the chosen experts (affinity) and as the router's output (anchor). The masked
  score gives no pull where e* is not chosen, so the anchor takes all probabilities; `anchor_on=sparse` is the other.
- Scores are taken before any renormalisation over the chosen experts, so that blocks compare. Sigmoid scores are
  divided by their sum.
- The anchor is a squared distance to e* as the paper has it, not a divergence from the original routing.
- Nothing below l*'s router moves, so its inputs are recorded once on the CPU, tokens * width numbers, and the anchor
  costs no forward. Its mean runs over all tokens of the forget rows, prompts included.
- Shared experts are never chosen. Several experts at once, which the paper finds to be worse, are left out. `layers`
  and `experts` narrow the choice.
- Noise on routers' inputs is off in training, and so are losses that balance experts.
- The authors give neither optimizer nor number of steps: AdamW without weight decay, and `until`.
- `preset=paper` takes the wrapped loss as the paper has it too (`base_preset=paper`): ascent without a bound, npo with
  beta 0.001, rmu with steering 8000, its value for Qwen1.5-MoE (32000 for DeepSeek-V2-Lite).

The manifest holds the choice, affinities, and the share of forget tokens that are sent to e*, before and after. Shared
experts can still hold what was forgotten.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.errors import UnsupportedError, UsageError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.losses import BaseLoss, base_loss, train_loss
from llmsurgery.methods.registry import register
from llmsurgery.train.config import TrainingConfig, option, trained_tensors

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.train.losses import RowLoss, Term
    from llmsurgery.train.trainable import Trainable

ROLES = ("expert.gate", "expert.up", "expert.down", "router")

PAPER_BASES: Mapping[str, tuple[str, ...]] = {
    "ga": ("max_forget_ce=0",),
    "graddiff": ("max_forget_ce=0", "retain_weight=1"),
    "npo": ("beta=0.001", "retain_weight=1"),
    "rmu": ("steering=8000", "retain_weight=1200"),
}
"""Hyperparameters of the losses that the paper wraps."""


@dataclass(frozen=True)
class UoeConfig:
    """Hyperparameters of UOE; `llmsurgery methods uoe` prints them with their help."""

    base: str = option("graddiff", "method whose loss is wrapped")
    base_settings: tuple[str, ...] = option((), "hyperparameters of that loss: NAME=VALUE,...")
    base_preset: str = option("toolkit", "its other ones: the toolkit's or the paper's", ("toolkit", "paper"))
    anchor_weight: float = option(1.0, "weight of the anchor (alpha in the paper); 0: none", minimum=0)
    anchor_on: str = option("dense", "scores of all experts, or of the chosen ones alone", ("dense", "sparse"))
    attribution_tokens: int = option(100_000, "forget tokens that attribution sees; 0: all", minimum=0)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(train="full", roles=ROLES, weight_decay=0.0)
    )


@dataclass(frozen=True)
class UoeData:
    """The base loss with what it prepared, and the forget rows in the order of that loss."""

    base: BaseLoss
    prepared: object
    forget: list[Encoded]


@dataclass(frozen=True)
class Choice:
    """The chosen expert.

    Attributes:
        layer: Its block.
        expert: Its number.
        affinities: Block number -> affinity of every expert, for the blocks and experts to choose from.
    """

    layer: int
    expert: int
    affinities: Mapping[int, Mapping[int, float]]

    def record(self) -> dict[str, object]:
        """Return what the manifest says of it: the choice, the next best, and the best of every block."""
        ranked = sorted(
            ((value, layer, expert) for layer, row in self.affinities.items() for expert, value in row.items()),
            key=lambda entry: (-entry[0], *entry[1:]),
        )
        rows = [{"layer": layer, "expert": expert, "affinity": round(value, 6)} for value, layer, expert in ranked]
        best = {row["layer"]: row for row in reversed(rows)}
        return {"target": rows[0], "next": rows[1:4], "best_by_layer": [best[layer] for layer in sorted(best)]}


def choose_expert(affinities: Mapping[int, torch.Tensor], candidates: Mapping[int, Sequence[int]]) -> Choice:
    """Return the expert with the highest affinity.

    Args:
        affinities: Block number -> affinities [experts].
        candidates: Block number -> experts to choose from.
    """
    table = {
        layer: {expert: float(affinities[layer][expert]) for expert in experts}
        for layer, experts in candidates.items()
    }  # fmt: skip
    layer, expert = max(
        ((layer, expert) for layer, row in table.items() for expert in row), key=lambda place: table[place[0]][place[1]]
    )
    return Choice(layer, expert, table)


def anchor_distances(scores: torch.Tensor, expert: int) -> torch.Tensor:
    """Return sum_i (s_i - a_i)^2 of every token [tokens], a_i = 1 for the expert and 0 for others.

    Args:
        scores: Scores [tokens, experts], fp32.
        expert: Number of the target.
    """
    import torch

    target = torch.nn.functional.one_hot(torch.tensor(expert), scores.shape[1]).to(scores)
    return (scores - target).square().sum(-1)


@register
class Uoe:
    """UOE as a method of the toolkit."""

    spec = MethodSpec(
        name="uoe",
        task="unlearn",
        summary="unlearn the one expert that forget rows use most and its router, under any unlearning loss",
        paper="SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?, arXiv 2411.18797",
        needs=("forget",),
        uses=("retain",),
        export="plain",
        trained=True,
        until="forget.token_prob<=0.2x",
        demo="moe",
        # So few weights move that the step size of adapters suits them.
        lr_scale=10.0,
        one_expert=True,
        presets={"paper": {"base_preset": "paper", "lr": 1e-4, "batch_size": 16, "epochs": 1, "max_steps": 0}},
    )
    config_type = UoeConfig

    def plan(self, config: UoeConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the experts and routers that there are to choose from.

        Raises:
            UnsupportedError: The model has no routed experts.
            UsageError: Other roles are asked for.
        """
        if not structure.experts:
            raise UnsupportedError(
                f"a {structure.family.name} model has no routed experts",
                "uoe moves one expert of a mixture and its router",
                "use a method for all models: llmsurgery methods lists them",
            )
        if config.training.roles != ROLES:
            raise UsageError(
                "uoe takes no roles", "it moves one expert and its router", "narrow the choice by layers and experts"
            )
        targets = trained_tensors(config.training, structure)
        layers = {target.layer for target in targets if target.expert is not None}
        # Of a block without experts in the choice the router stays.
        return [target for target in targets if target.layer in layers]

    def prepare(self, config: UoeConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> UoeData:
        """Let the base loss encode the data."""
        own = PAPER_BASES.get(config.base, ()) if config.base_preset == "paper" else ()
        base = base_loss(config.base, (*own, *config.base_settings), config.training)
        prepared = base.prepare(encoder, data)
        return UoeData(base, prepared, cast(Any, prepared).forget)

    def edit(self, config: UoeConfig, operation: Operation, prepared: UoeData) -> MethodResult:
        """Choose the expert, train it and its router, and return them as edits."""
        from llmsurgery.train.routing import router_inputs, routing_rate, switch_off_jitter

        model, pad_id = operation.model, operation.encoder.pad_id
        switch_off_jitter(model)
        choice, router = _attribute(self.plan(config, operation.structure), config, operation, prepared.forget)
        training = replace(config.training, layers=(choice.layer,), experts=(choice.expert,))
        targets = trained_tensors(training, operation.structure)
        inputs = router_inputs(model, router, prepared.forget, pad_id, operation.progress)
        before = routing_rate(model, router, inputs, choice.expert)
        base = _placed(prepared.base, training, choice.layer)

        def make(trainable: Trainable) -> RowLoss:
            loss = base.make(operation, prepared.prepared, trainable)
            anchor = _anchor(config, operation, router, inputs, choice.expert)
            return _with_anchor(loss, anchor)

        result = train_loss(make, targets, training, operation)
        rates = {"before": before, "after": routing_rate(model, router, inputs, choice.expert)}
        record = {**result.record, **choice.record(), "share_of_forget_tokens_sent_there": rates}
        return replace(result, record=record, targets=targets)


def _attribute(
    targets: Sequence[RoleTensor], config: UoeConfig, operation: Operation, forget: Sequence[Encoded]
) -> tuple[Choice, RoleTensor]:
    """Return the expert that forget rows use most, and its router."""
    from llmsurgery.train.routing import affinities

    routers = {target.layer: target for target in targets if target.role == "router" and target.layer is not None}
    candidates: dict[int, list[int]] = {layer: [] for layer in routers}
    for target in targets:
        if target.role == "expert.down" and target.layer is not None and target.expert is not None:
            candidates[target.layer].append(target.expert)
    rows = list(forget)
    if config.attribution_tokens:
        random.Random(operation.seed).shuffle(rows)
        kept, tokens = 0, 0
        while kept < len(rows) and tokens < config.attribution_tokens:
            tokens += len(rows[kept].ids)
            kept += 1
        rows = rows[:kept]
    scoring = operation.structure.family.router_scores
    found = affinities(operation.model, routers, scoring, rows, operation.encoder.pad_id, operation.progress)
    choice = choose_expert(found, candidates)
    return choice, routers[choice.layer]


def _placed(base: BaseLoss, training: TrainingConfig, layer: int) -> BaseLoss:
    """Tell the base loss what moves; one on a block's output that names no block gets the chosen one."""
    config = cast(Any, base.config)
    own = {"layer": layer} if getattr(config, "layer", layer) is None else {}
    return replace(base, config=dataclasses.replace(config, training=training, **own))


def _anchor(
    config: UoeConfig, operation: Operation, router: RoleTensor, inputs: Sequence[torch.Tensor], expert: int
) -> Term:
    """Return the anchor, a mean over all tokens of the forget rows of a step."""
    import torch

    from llmsurgery.train.losses import Term, TokenMean
    from llmsurgery.train.routing import gating_scores, masked_scores, route

    mean = TokenMean()
    scoring = operation.structure.family.router_scores

    def value(rows: Sequence[int]) -> torch.Tensor:
        logits, chosen = route(operation.model, router, torch.cat([inputs[i] for i in rows]))
        scores = gating_scores(logits, scoring)
        if config.anchor_on == "sparse":
            scores = masked_scores(scores, chosen)
        result = mean(anchor_distances(scores, expert), len(rows))
        operation.training.observe(anchor=float(result.detach()))
        return result

    return Term(value, config.anchor_weight, lambda rows: mean.begin([len(inputs[i]) for i in rows]))


def _with_anchor(loss: RowLoss, anchor: Term) -> RowLoss:
    from llmsurgery.train.losses import Term

    def value(rows: Sequence[int]) -> torch.Tensor:
        total = loss.forget.weight * loss.forget.value(rows)
        return total + anchor.weight * anchor.value(rows) if anchor.weight else total

    def begin(rows: Sequence[int]) -> None:
        loss.forget.begin(rows)
        anchor.begin(rows)

    return replace(loss, forget=Term(value, begin=begin))
