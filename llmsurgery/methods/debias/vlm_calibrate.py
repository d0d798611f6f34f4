"""Post-hoc debias of vision-language models: divide out what a model answers without the picture.

Paper: "Debiasing Multimodal Large Language Models", arXiv 2403.05262; the same form for text is arXiv 2102.09690. No
training, and no right answers are looked at.

Each question that is learnt from is asked again with its picture removed, which leaves what the model would say anyway:

    p_cf = mean over the questions of the choices' probabilities without the picture, normalised, plus epsilon
    W = diag(p_cf)^-1, b = 0:  q = W p, normalised    which is the constant offset  delta = log target - log p_cf

with a uniform target unless `target_prior` names another. Questions with different choices ("red, green, blue" and
"yes, no") have a prior each. delta is centred, times `strength`, cut at `cap`, and folded into the rows of the language
model's head as by `pride`; the vision tower and the projector stay as they are.

    content_free=none     the tokens of the picture are left out
    content_free=unk      an unknown token stands in each of their places
    content_free=both     the two are added

The questions are those of `--mcq`: records with `image`, the path of a picture relative to the file, `question`,
`choices` and `answer`, such as

    {"image": "images/17.png", "question": "What colour is the car? Answer with one word.",
     "choices": ["red", "blue", "white"], "answer": "blue"}

Choices are told apart by their first token. Their forms of one token are summed: with and without a blank, as written,
in small letters and capitalised. What the prompt needs besides stands in `question`: choices are not listed. Figures
are of questions that were not learnt from, with and without their pictures.

What differs from the released code (LLaVA-Align):

- It calibrates every question by itself, or the whole set once. A checkpoint can hold the second alone.
- It reads the choices from the first ten decoded tokens, where a missing one counts as 0 and " Yes" is not "yes", and
  after a temperature of 0.2. Here probabilities are of the whole vocabulary, at temperature 1, all forms summed.
- Its calibration error applies softmax to probabilities; it is not computed here.

Calibration assumes that all choices are right equally often: give `target_prior` where they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.letter_questions import FoldConfig
from llmsurgery.methods.picture_questions import CONTENT_FREE, PROJECTOR
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.asked import Asked
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class VlmCalibrateConfig:
    """Hyperparameters of the calibration; `llmsurgery methods vlm-calibrate` prints them with their help."""

    content_free: str = option("none", "how the picture is removed", CONTENT_FREE)
    epsilon: float = option(1e-4, "added to each choice's share without a picture", minimum=0)
    target_prior: tuple[float, ...] = option((), "shares of the choices that are aimed at; empty: equal ones")
    holdout: float = option(0.5, "share of --mcq that is measured and not learnt from", minimum=0, maximum=0.95)
    kl_budget: float | None = option(0.05, "gate on utility.kl, nats per token; none: no gate", minimum=0)
    fold: FoldConfig = field(default_factory=FoldConfig)


@register
class VlmCalibrate:
    """Post-hoc debias as a method of the toolkit."""

    spec = MethodSpec(
        name="vlm-calibrate",
        task="debias",
        summary="divide out what a vision-language model answers without the picture, as constant offsets",
        paper="Debiasing Multimodal Large Language Models, arXiv 2403.05262",
        needs=("mcq",),
        uses=("text",),
        export="plain",
        trained=False,
        selects=True,
        demo="shapes",
        roles=PROJECTOR,
        pictures=True,
    )
    config_type = VlmCalibrateConfig

    def plan(self, config: VlmCalibrateConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the head; generation_config.json is no tensor.

        Raises:
            UnsupportedError: The model sees no pictures.
        """
        from llmsurgery.methods.label_offsets import plan_offsets
        from llmsurgery.methods.picture_questions import require_projector

        require_projector(structure, self.spec.name)
        return plan_offsets(structure, config.fold.route)

    def prepare(self, config: VlmCalibrateConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: questions are checked when they are read."""

    def check_asked(self, config: VlmCalibrateConfig, encoder: Encoder, given: Asked) -> None:
        """Check the target, and that there is an unknown token where one is needed.

        Raises:
            UsageError: The target is no distribution over the choices.
            UnsupportedError: There is no unknown token.
        """
        from llmsurgery.methods.picture_questions import check_target, check_unknown

        check_unknown(config.content_free, encoder)
        check_target(config.target_prior, given)

    def edit(self, config: VlmCalibrateConfig, operation: Operation, prepared: None) -> MethodResult:
        """Ask without pictures, and fold what is said."""
        from llmsurgery.methods.picture_questions import fold_choices, group_priors
        from llmsurgery.methods.priors import centred_offsets

        priors = group_priors(operation, config.content_free, config.epsilon)
        deltas = [centred_offsets(prior, config.target_prior) for prior in priors]
        return fold_choices(operation, deltas, priors, config.fold)
