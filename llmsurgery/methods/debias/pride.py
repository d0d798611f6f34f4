"""PriDe: take a model's prior of answer letters away, estimated without labels from permuted options.

Paper: "Large Language Models Are Not Robust Multiple Choice Selectors", arXiv 2309.03882 (ICLR 2024). No training, and
no right answers are looked at.

Every question that is learnt from is asked in all n cyclic orders of its options, so that each option stands at every
letter once. With s[o, j] the log-probability of letter j in order o:

    prior of a question   softmax_j(mean_o log(p[o, j] + 1e-10)), p normalised over the letters; the contents cancel
    prior                 the geometric mean over the questions
    estimator=pride       delta = -log prior, centred
    estimator=share       from there, the offsets for which every letter is the likeliest equally often over all orders:
                          the mean log prior equalises log-probabilities, which is not what a share of answers is

Answers need not be spread evenly over the letters: `target_prior` names the shares that are aimed at, in place of 1/n.
Then delta = log target - log prior, centred, and estimator=share fits these shares.

delta, times `strength` and cut at `cap`, is added to the logits of each letter's tokens, with and without a blank. The
paper divides probabilities while the model runs; here the offsets are folded into the checkpoint:

    a bias of the head, or a final LayerNorm with bias    exact
    an RMSNorm                                            by least squares at the places where letters follow; `rho`
                                                          says how nearly constant the shift is
    route=sequence-bias                                   generation_config.json, for `generate` alone

An offset acts wherever the token may stand, and " A" is a word: utility.kl is bounded by `kl_budget`, and
mcq.letter_prob shows what the letters have on ordinary text. A prior belongs to one form of prompt: offsets fitted in
one leave another as it was. Figures are measured on questions that were not learnt from, in every cyclic order.

What differs from the released code (chujiezheng/LLM-MCQ-Bias):

- It takes the arithmetic mean of the questions' priors, which falls short where they differ; `preset=paper` does too.
- It knows four or five options by tables; here any number follows the general rule.
- It reports accuracy with the learnt-from questions answered by n forwards each; these are not counted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.letter_questions import FoldConfig
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.asked import Asked
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class PrideConfig:
    """Hyperparameters of PriDe; `llmsurgery methods pride` prints them with their help."""

    estimator: str = option("share", "share: equal shares of the letters; pride: the paper's", ("share", "pride"))
    aggregation: str = option("geometric", "mean of the questions' priors", ("geometric", "arithmetic"))
    target_prior: tuple[float, ...] = option((), "shares of the letters that are aimed at; empty: equal ones")
    items: int = option(0, "questions that are learnt from; 0: all that are not held out", minimum=0)
    holdout: float = option(0.5, "share of --mcq that is measured and not learnt from", minimum=0, maximum=0.95)
    template: str = option("", "file with the prompt; default: the shipped one")
    kl_budget: float | None = option(0.05, "gate on utility.kl, nats per token; none: no gate", minimum=0)
    fold: FoldConfig = field(default_factory=FoldConfig)


@register
class Pride:
    """PriDe as a method of the toolkit."""

    spec = MethodSpec(
        name="pride",
        task="debias",
        summary="take the prior of answer letters away by constant offsets, from permuted options without labels",
        paper="Large Language Models Are Not Robust Multiple Choice Selectors, arXiv 2309.03882",
        needs=("mcq",),
        uses=("text",),
        export="plain",
        trained=False,
        selects=True,
        demo="letters",
        presets={"paper": {"estimator": "pride", "aggregation": "arithmetic"}},
    )
    config_type = PrideConfig

    def plan(self, config: PrideConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the head or its bias; generation_config.json is no tensor."""
        from llmsurgery.methods.label_offsets import plan_offsets

        return plan_offsets(structure, config.fold.route)

    def prepare(self, config: PrideConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: questions are checked by `check_asked`."""

    def check_asked(self, config: PrideConfig, encoder: Encoder, given: Asked) -> None:
        """Check letters and target.

        Raises:
            UnsupportedError: A letter is no token.
            UsageError: The target is no distribution over the letters.
        """
        from llmsurgery.methods.letter_questions import check_target, encode_given

        if given.choices is not None:
            check_target(config.target_prior, given.choices.options)
            encode_given(encoder, given.choices, config.template, 1)

    def edit(self, config: PrideConfig, operation: Operation, prepared: None) -> MethodResult:
        """Ask in every order, estimate the offsets and fold them."""
        import numpy as np

        from llmsurgery.methods.label_offsets import FoldSettings, fold_offsets, label_offsets
        from llmsurgery.methods.letter_questions import ask_given, encode_given, named
        from llmsurgery.methods.priors import estimate_offsets, shares

        assert operation.choices is not None
        data = encode_given(operation.encoder, operation.choices, config.template, config.items)
        found = ask_given(operation, data)
        scores = found.log_probabilities
        delta, prior = estimate_offsets(scores, config.estimator, config.aggregation, config.target_prior)
        applied = np.clip(config.fold.strength * delta, -config.fold.cap, config.fold.cap)
        if not applied.any():
            raise no_prior()
        assert found.states is not None
        settings = FoldSettings(config.fold.route, config.fold.min_rho, config.fold.untie)
        states = found.states.reshape(-1, found.states.shape[-1])
        folded = fold_offsets(operation, label_offsets(data.tokens, applied), states, data.prompts, settings)
        record: dict[str, object] = {
            "prior": named(data.letters, prior),
            "offsets": named(data.letters, applied),
            "capped": bool((np.abs(config.fold.strength * delta) > config.fold.cap).any()),
            "shares_before": named(data.letters, shares(scores, np.zeros(len(prior)))),
            "shares_predicted": named(data.letters, shares(scores, applied)),
            "items": len(data.questions),
            "forwards": len(data.prompts),
            "template_sha256": data.template,
            **folded.record,
        }
        return MethodResult(folded.edits, record, folded.targets)


def no_prior() -> Exception:
    """Return the error of a model without a prior."""
    from llmsurgery.errors import NoEffectError

    return NoEffectError("all offsets are 0", "the letters are equally likely, or strength is 0", "raise the strength")
