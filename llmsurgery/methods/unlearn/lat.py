"""Targeted LAT: unlearn under perturbations of the residual stream that bring the forget answers back.

Paper: "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs", arXiv 2407.15549 (TMLR
2025), first called "Targeted Latent Adversarial Training ...". Untargeted LAT: arXiv 2403.05030.

A forget row is a prompt x with a bad completion r; its good completion c is the chosen one of a preference pair, or a
template answer. With h_l the residual stream after block l, and M = 1 at the attacked tokens:

    h_l <- h_l + M delta_l,   every token's |delta_l| <= eps_l                    for each of `attack_layers`
    toward(y) = mean over tokens of -log p(y_t)
    away(y)   = mean over tokens of -log(1 - p(y_t)), 0 where log p(y_t) < -5; divided by the number of all tokens

Each outer step attacks its rows, from delta = 0, with `pgd_steps` of AdamW, each followed by a projection onto the
ball, on adversary_toward toward(r) + adversary_away away(c). Then come `model_steps` steps on the same rows:

    L = toward_weight toward(c) + away_weight away(r) under the attack
        + sft_weight CE(retain) + kl_weight KL(now || before)(retain) without it

`base` puts another loss in the place of the first line:

    toward-away   as above: refusal training and unlearning
    preference    -log sigmoid(beta ((lp_c - lp_r) - (lp_c^ref - lp_r^ref))), `preference=ipo` for its square;
                  the adversary minimises it with c and r exchanged: removal of backdoors, without their triggers
    a method      its loss (`ga`, `graddiff`, `npo`, `rmu`, ...), forget term under attack and retain term not;
                  `base_settings` are its hyperparameters, and the adversary minimises toward(r)

`preset=paper` is the recipe for WMDP by ascent; the others are `wmdp-rmu`, `jailbreak`, `jailbreak-llama3`, `backdoor`.
No harmful rows are shipped: `--forget` takes prompts with the completion that is to go, or prompt/chosen/rejected.

What differs from the released code (aengusl/latent-adversarial-training at 53ac752):

- It adds delta to the MLP's output, which is the stream only where no norm follows. Here: what the block writes.
  "embedding" is what enters block 0.
- Two debugger stops and a width of 4096 are left in it, clean-up of gradients acts on one layer alone, attention masks
  are not passed, and under RMU its masks mark padding. None of that here; rows are padded on the right and masked.
- Its KL divides by tokens and vocabulary and then by its own value, so that its size is always 1 and its gradient does
  not fade: `kl_mode=normalised`, to which the weight 0.1 belongs. The default is the mean over tokens. It takes the
  positions of the labels, here those that predict them.
- Its backdoor recipe passes a coefficient that nothing reads: no benign loss. The preset has none either.
- Its RMU recipe draws a new direction for every batch, here one for the run. It cuts rows to 512 or 768 tokens; the
  preset takes 768.
- Its WMDP recipe runs c = unrelated text under the perturbations of r. Here there is no such text: the preset has
  toward_weight 0 and keeps the benign loss.
- Its jailbreak and WMDP recipes make a new optimizer for each outer step: `fresh_optimizer`, on in their presets. Here
  one keeps its moments by default.
- Left out: the recipe for one book (WHP), whose generic labels need another model.

Choices of this project:

- Attacked are the prompt's tokens, and all tokens of a plain text; `attack_positions=all` takes all of every row.
- eps is a length and means nothing without that of the stream: `eps=none` is `eps_rel` times the median length of h_l
  at the attacked tokens before training. Too large a share lets the adversary write any answer, learned or not: the
  stop rule under attack is then never reached, and utility pays. `inner_lr=none` is about half of eps a step.
- A row is attacked by itself, with a mean over its own tokens, so that perturbations do not depend on the micro-batch.
- `attack_layers` empty: 1/4, 2/4, 3/4 of the depth and the last block but one. For `rmu`, those of them in front of the
  steered block, or the one before it: a prompt that is perturbed later does not reach the answers there.
- The stop rule must hold under a fresh attack too (`until_attacked`), asked once per pass over the forget rows.
- States are kept between outer steps, so nothing of an attack is ever stored. `max_steps` counts model steps.
- delta has no weight decay by default; the authors' is 0.01.

Utility pays for robustness: read the retain figures. delta exists in training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.errors import UsageError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.lat_recipes import EMBEDDING, PRESETS
from llmsurgery.methods.losses import BaseLoss, base_loss, encode_sets, train_loss
from llmsurgery.methods.registry import register
from llmsurgery.methods.templates import (
    TEMPLATE_LISTS,
    TEMPLATES_HELP,
    TemplateRows,
    encode_with_templates,
    load_templates,
)
from llmsurgery.methods.unlearn.rmu import RmuConfig, steered_block
from llmsurgery.train.config import TrainingConfig, option, trained_tensors

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.train.adversary import Adversary
    from llmsurgery.train.losses import RowLoss
    from llmsurgery.train.trainable import Trainable

OWN = ("toward-away", "preference")


@dataclass(frozen=True)
class LatConfig:
    """Hyperparameters of targeted LAT; `llmsurgery methods lat` prints them with their help."""

    base: str = option("toward-away", "toward-away, preference, or the method whose loss is put under attack")
    base_settings: tuple[str, ...] = option((), "hyperparameters of that method's loss: NAME=VALUE,...")
    toward_weight: float = option(0.5, "weight of the good completions' cross-entropy", minimum=0)
    away_weight: float = option(0.5, "weight of -log(1 - p) of the forget answers", minimum=0)
    templates: str = option("idk", f"good completions of rows without one; {TEMPLATES_HELP}", shipped=TEMPLATE_LISTS)
    preference: str = option("dpo", "form of base=preference", ("dpo", "ipo"))
    beta: float = option(0.3, "inverse temperature of base=preference", minimum=1e-6)
    sft_weight: float = option(0.0, "weight of the retain rows' cross-entropy, own bases alone", minimum=0)
    kl_weight: float = option(1.0, "weight of the retain rows' KL, own bases alone", minimum=0)
    kl_mode: str = option(
        "batchmean", "mean over tokens, or divided by its own value as released", ("batchmean", "normalised")
    )
    targeted: bool = option(True, "false: the adversary only drives the good completions away")
    adversary_toward: float = option(0.5, "adversary's weight of the forget answers' cross-entropy", minimum=0)
    adversary_away: float = option(0.5, "adversary's weight of -log(1 - p) of the good completions", minimum=0)
    attack_layers: tuple[str, ...] = option((), "blocks whose output is perturbed, or embedding; empty: about four")
    attack_positions: str = option(
        "auto", "prompts and whole plain texts, prompts alone, or all tokens", ("auto", "prompt", "all")
    )
    eps: float | None = option(None, "largest length of a token's perturbation; none: by eps_rel", minimum=0)
    eps_rel: float = option(0.03, "the same as a share of the median length of the stream there", minimum=0)
    inner_lr: float | None = option(None, "step size of the adversary; none: eps / (2 sqrt(width))", minimum=0)
    inner_weight_decay: float = option(0.0, "weight decay of the perturbations", minimum=0)
    pgd_steps: int = option(16, "steps of the adversary", minimum=1)
    model_steps: int = option(4, "optimizer steps on the rows of one attack", minimum=1)
    refresh_every: int = option(0, "of these steps, how many until a new attack; 0: all of them", minimum=0)
    fresh_optimizer: bool = option(False, "the optimizer forgets its moments before each outer step")
    until_attacked: bool = option(True, "the stop rule must hold under a fresh attack as well")
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class LatData:
    """Encoded rows, and what the loss is made of: pairs, or another method's loss with what it prepared."""

    forget: list[Encoded]
    retain: list[Encoded]
    source: TemplateRows | tuple[BaseLoss, object]


def attacked_places(config: LatConfig, structure: Structure) -> list[int]:
    """Return the numbers of the blocks whose output is perturbed; -1 is what enters block 0.

    Raises:
        UsageError: One does not exist.
    """
    count = structure.layers
    if not config.attack_layers:
        spread = sorted({min(max(1, round(count * i / 4)), max(0, count - 2)) for i in range(1, 5)})
        base = _wrapped(config)
        if base is None or not isinstance(base.config, RmuConfig):
            return spread
        block = steered_block(base.config, structure)
        return [place for place in spread if place < block] or [block - 1]
    names = {EMBEDDING: -1, **{str(number): number for number in range(count)}}
    if unknown := [name for name in config.attack_layers if name not in names]:
        raise UsageError(
            f"{unknown[0]} cannot be attacked",
            f"the model has blocks 0 to {count - 1}, and `{EMBEDDING}` in front of them",
            "change `attack_layers`",
        )
    return sorted({names[name] for name in config.attack_layers})


def _wrapped(config: LatConfig) -> BaseLoss | None:
    """Return the loss of another method that is put under attack, None for the own ones."""
    if config.base in OWN:
        if config.base_settings:
            raise UsageError(f"{config.base} has no base_settings", "they belong to the loss of a method", "drop them")
        return None
    return base_loss(config.base, config.base_settings, config.training)


@register
class Lat:
    """Targeted LAT as a method of the toolkit."""

    spec = MethodSpec(
        name="lat",
        task="unlearn",
        summary="unlearn under perturbations of the residual stream that bring the answers back; around any loss",
        paper="Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors, arXiv 2407.15549",
        needs=("forget",),
        uses=("retain",),
        export="plain",
        trained=True,
        until="forget.token_prob<=0.2x",
        # The demo's model speaks a few hundred words; it learns its own "I am not sure." and not a stranger's.
        demo_settings={"templates": "demo"},
        presets=PRESETS,
    )
    config_type = LatConfig

    def plan(self, config: LatConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that training may move: those that the wrapped loss says, if there is one."""
        attacked_places(config, structure)
        base = _wrapped(config)
        return trained_tensors(config.training, structure) if base is None else base.method.plan(base.config, structure)

    def prepare(self, config: LatConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> LatData:
        """Encode the rows.

        Raises:
            UsageError: Retain rows that a weight asks for are not given, or a loss has nothing to minimise.
        """
        _check_aims(config)
        limit = config.training.max_length
        if (base := _wrapped(config)) is not None:
            prepared = base.prepare(encoder, data)
            return LatData(cast(Any, prepared).forget, [], (base, prepared))
        if (config.sft_weight or config.kl_weight) and "retain" not in data:
            raise UsageError(
                "--retain is missing",
                "sft_weight and kl_weight act on retain rows",
                "give it, or leave them out with --set kl_weight=0 --set sft_weight=0",
            )
        pairs = encode_with_templates(encoder, data["forget"], load_templates(config.templates), limit)
        return LatData(pairs.forget, encode_sets(encoder, data, limit).retain, pairs)

    def edit(self, config: LatConfig, operation: Operation, prepared: LatData) -> MethodResult:
        """Train under attack, and return the adapters or weights as edits."""
        from llmsurgery.train.adversary import Adversary
        from llmsurgery.train.attacked import settled

        places = attacked_places(config, operation.structure)
        operation.training.renew_every = config.model_steps if config.fresh_optimizer else 0
        with ExitStack() as stack:

            def make(trainable: Trainable) -> RowLoss:
                recomputes = config.training.gradient_checkpointing
                adversary = Adversary(trainable, operation.structure, places, config.attack_positions, recomputes)
                calm = stack.enter_context(adversary.installed())
                return _attacked(config, operation, prepared, calm, adversary, stack)

            training = settled(config.training, len(prepared.forget), config.model_steps, config.until_attacked)
            return train_loss(make, self.plan(config, operation.structure), training, operation)


def _check_aims(config: LatConfig) -> None:
    """Refuse an adversary or a defence without anything to minimise."""
    toward = config.adversary_toward if config.targeted else 0.0
    away = config.adversary_away if config.base == "toward-away" else 0.0
    if not config.targeted and config.base != "toward-away":
        raise UsageError(
            f"base={config.base} has no untargeted adversary",
            "without the forget answers there is nothing that it could minimise",
            "use base=toward-away, or leave out targeted=false",
        )
    if not toward and not away and config.base != "preference":
        raise UsageError(
            "the adversary has nothing to minimise", "its weights are 0", "raise adversary_toward or adversary_away"
        )
    if config.base == "toward-away" and not config.toward_weight and not config.away_weight:
        raise UsageError("the loss has no forget term", "its weights are 0", "raise toward_weight or away_weight")


def _attacked(
    config: LatConfig,
    operation: Operation,
    prepared: LatData,
    trainable: Trainable,
    adversary: Adversary,
    stack: ExitStack,
) -> RowLoss:
    """Return the loss under attack, and put the stop rule under attack too."""
    from llmsurgery.methods.lat_pairs import LatPairs
    from llmsurgery.train.adversary import Strength
    from llmsurgery.train.attacked import Attack, OuterSteps, stop_under_attack
    from llmsurgery.train.pooling import row_means
    from llmsurgery.train.scorer import Scorer

    scorer = Scorer(trainable, operation.encoder.pad_id)
    if config.eps is None:
        norms = adversary.median_norms(scorer, prepared.forget)
        radius = {place: config.eps_rel * norm for place, norm in norms.items()}
    else:
        radius = dict.fromkeys(adversary.places, config.eps)
    strength = Strength(radius, config.inner_lr, config.pgd_steps, config.inner_weight_decay)

    def toward(indices: Sequence[int]) -> torch.Tensor:
        scores, owners = scorer.log_probabilities([prepared.forget[i] for i in indices])
        return -row_means(scores, owners, len(indices)).sum()

    attack = Attack(adversary, strength, prepared.forget, toward)
    if config.until_attacked:
        stack.enter_context(stop_under_attack(operation.training, attack, config.training.batch_size))
    if isinstance(prepared.source, tuple):
        base, data = prepared.source
        loss = base.make(operation, data, trainable)
    else:
        own = LatPairs(config, operation, prepared.source, prepared.retain, scorer)
        loss = own.loss()
        attack = replace(attack, objective=own.objective(), renew=own.renew, good=own.good)
    facts = {**loss.facts, "attack_radius": {_name(place): value for place, value in radius.items()}}
    return replace(OuterSteps(loss, attack, config.model_steps, config.refresh_every).attacked(), facts=facts)


def _name(place: int) -> str:
    return EMBEDDING if place < 0 else str(place)
