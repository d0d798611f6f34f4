"""Debias sampling: contrastive decoding against what a vision-language model says without the picture.

Paper: "Debiasing Multimodal Large Language Models", arXiv 2403.05262 (visual debias decoding, VDD).

With l the logits of a step and l_cf those of the same step after the prompt without its picture:

    cutoff = max(l) + log(beta)
    l_cd   = (1 + alpha) l - alpha l_cf     where l >= cutoff, else -inf

Both streams get the token that was chosen, and each keeps its own keys and values. Temperature, top-k and top-p come
afterwards. That takes two forwards a token and is a way of decoding, not a change of weights, so it has two forms
(`form`):

- `processor`, the default and exact: `modeling_contrast.py`, which holds a `LogitsProcessor`, and `contrast.json` with
  its settings. It works with stock `generate` of the unchanged model, and does nothing for plain scores:

      processor = ContrastLogitsProcessor.from_pretrained(DIRECTORY, model)
      model.generate(**inputs, logits_processor=[processor])

- `folded`, the nearest plain checkpoint, which is not in the paper. Among the choices of a question the largest l_cd is
  the largest l - alpha / (1 + alpha) l_cf. With l_cf replaced by its mean over the questions that is a constant offset

      delta = - alpha / (1 + alpha) log p_cf

  centred and folded as by `vlm-calibrate`: a calibration of strength alpha / (1 + alpha). It corrects the choices alone
  and has no plausibility mask.

    content_free=none     the tokens of the picture are left out
    content_free=unk      an unknown token stands in each of their places
    content_free=both     the logits of the two are averaged

Questions are given as to `vlm-calibrate`; `processor` learns nothing from them, they are for the figures. Those of a
processor are what `generate` would choose from at its first step.

What differs from the released code (LLaVA-Align):

- It finds positions by the row numbers of the attention mask, which is right for one prompt without padding alone. Here
  prompts of a batch may differ in length.
- alpha is 1 and beta 0.1, its defaults on the command line; where these are not given, its `generate` takes alpha 0.5.
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

FORMS = {"processor": "processor", "folded": "plain"}


@dataclass(frozen=True)
class VlmContrastConfig:
    """Hyperparameters of contrastive decoding; `llmsurgery methods vlm-contrast` prints them with their help."""

    form: str = option("processor", "processor: exact, for generation; folded: plain weights", tuple(FORMS))
    alpha: float = option(1.0, "weight of the difference between the two streams", minimum=0)
    beta: float = option(0.1, "smallest share of the likeliest token's probability that stays", minimum=1e-6, maximum=1)
    content_free: str = option("none", "how the picture is removed", CONTENT_FREE)
    epsilon: float = option(1e-4, "form=folded: added to each choice's share without a picture", minimum=0)
    holdout: float = option(0.5, "share of --mcq that is measured and not learnt from", minimum=0, maximum=0.95)
    kl_budget: float | None = option(0.05, "gate on utility.kl, nats per token; none: no gate", minimum=0)
    fold: FoldConfig = field(default_factory=FoldConfig)


@register
class VlmContrast:
    """Contrastive decoding as a method of the toolkit."""

    spec = MethodSpec(
        name="vlm-contrast",
        task="debias",
        summary="decode against what a vision-language model says without the picture, by a logits processor",
        paper="Debiasing Multimodal Large Language Models, arXiv 2403.05262",
        needs=("mcq",),
        uses=("text",),
        export="processor",
        trained=False,
        selects=True,
        demo="shapes",
        forms=FORMS,
        roles=PROJECTOR,
        pictures=True,
    )
    config_type = VlmContrastConfig

    def plan(self, config: VlmContrastConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the head for `folded`; a processor changes no tensor.

        Raises:
            UnsupportedError: The model sees no pictures.
        """
        from llmsurgery.methods.label_offsets import plan_offsets
        from llmsurgery.methods.picture_questions import require_projector

        require_projector(structure, self.spec.name)
        return plan_offsets(structure, config.fold.route) if config.form == "folded" else []

    def prepare(self, config: VlmContrastConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: questions are checked when they are read."""

    def check_asked(self, config: VlmContrastConfig, encoder: Encoder, given: Asked) -> None:
        """Check that there is an unknown token where one is needed.

        Raises:
            UnsupportedError: There is none.
        """
        from llmsurgery.methods.picture_questions import check_unknown

        check_unknown(config.content_free, encoder)

    def edit(self, config: VlmContrastConfig, operation: Operation, prepared: None) -> MethodResult:
        """Return the processor's files, or fold what is said without pictures."""
        import numpy as np

        from llmsurgery.compute.bundle import contrast_files
        from llmsurgery.data.pictured import pictures_digest
        from llmsurgery.methods.picture_questions import fold_choices, group_priors, kinds_of, pictures_of
        from llmsurgery.methods.priors import centred_offsets

        data = pictures_of(operation)
        if config.form == "processor":
            settings = {
                "image_id": data.image_id,
                "kinds": list(kinds_of(config.content_free)),
                "alpha": config.alpha,
                "beta": config.beta,
                "unknown_id": data.unknown_id,
                "pad_id": operation.encoder.pad_id,
            }
            return MethodResult(
                contrast_files(settings), {**settings, "pictures_sha256": pictures_digest(data.questions)}
            )
        priors = group_priors(operation, config.content_free, config.epsilon)
        share = config.alpha / (1 + config.alpha)
        deltas = [share * centred_offsets(np.asarray(prior)) for prior in priors]
        return fold_choices(operation, deltas, priors, config.fold)
