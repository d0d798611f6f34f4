"""Contextual calibration: divide out what a model says to a question without content.

Paper: "Calibrate Before Use: Improving Few-Shot Performance of Language Models", arXiv 2102.09690; the same form for
images is arXiv 2403.05262. No training, and no right answers are looked at.

The prompt is filled with "N/A", with nothing and with "[MASK]" in place of the question and of every option, and

    p_cf = mean over these of the letters' probabilities, normalised
    W = diag(p_cf)^-1, b = 0:  q = W p, normalised    which is the constant offset  delta = log target - log p_cf

with a uniform target unless `target_prior` names another. delta is centred, times `strength`, cut at `cap`, and folded
into the checkpoint as by `pride`. Only this one offset for all questions can be stored; the version of the papers that
calibrates every question by itself cannot.

Such inputs are unlike any question: where options can be permuted, `pride` is the better estimate. Calibration assumes
that all letters are right equally often.

What differs from the released code:

- LLaVA-Align reads the classes from the first ten decoded tokens, where a missing one counts as 0, and after a
  temperature of 0.2 and filters; few-shot-learning reads the first 100. Here probabilities are of the whole vocabulary,
  at temperature 1, and the forms of a letter, with and without a blank, are summed.
- Its calibration error applies softmax to probabilities; it is not computed here.
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

STATES = 96
"""Prompts with content whose states the least-squares route is fitted to; each order of a question is one."""


@dataclass(frozen=True)
class ContextualConfig:
    """Hyperparameters of contextual calibration; `llmsurgery methods contextual` prints them with their help."""

    inputs: tuple[str, ...] = option(("N/A", "", "[MASK]"), "what stands for question and options")
    target_prior: tuple[float, ...] = option((), "shares of the letters that are aimed at; empty: equal ones")
    holdout: float = option(0.5, "share of --mcq that is measured and not learnt from", minimum=0, maximum=0.95)
    template: str = option("", "file with the prompt; default: the shipped one")
    kl_budget: float | None = option(0.05, "gate on utility.kl, nats per token; none: no gate", minimum=0)
    fold: FoldConfig = field(default_factory=FoldConfig)


@register
class Contextual:
    """Contextual calibration as a method of the toolkit."""

    spec = MethodSpec(
        name="contextual",
        task="debias",
        summary="divide out what the model answers to a question without content, as constant offsets of the letters",
        paper="Calibrate Before Use: Improving Few-Shot Performance of Language Models, arXiv 2102.09690",
        needs=("mcq",),
        uses=("text",),
        export="plain",
        trained=False,
        selects=True,
        demo="letters",
    )
    config_type = ContextualConfig

    def plan(self, config: ContextualConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the head or its bias; generation_config.json is no tensor."""
        from llmsurgery.methods.label_offsets import plan_offsets

        return plan_offsets(structure, config.fold.route)

    def prepare(self, config: ContextualConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: questions are checked by `check_asked`."""

    def check_asked(self, config: ContextualConfig, encoder: Encoder, given: Asked) -> None:
        """Check letters and target.

        Raises:
            UnsupportedError: A letter is no token.
            UsageError: The target is no distribution over the letters, or there are no inputs.
        """
        from llmsurgery.errors import UsageError
        from llmsurgery.methods.letter_questions import check_target, encode_given

        if given.choices is None:
            return
        encode_given(encoder, given.choices, config.template, 1)
        check_target(config.target_prior, given.choices.options)
        if not config.inputs:
            raise UsageError("inputs is empty", "nothing stands for the content", "drop the setting")

    def edit(self, config: ContextualConfig, operation: Operation, prepared: None) -> MethodResult:
        """Ask without content, and fold what is said."""
        import numpy as np

        from llmsurgery.data.choices import Question
        from llmsurgery.data.mcq import Choices
        from llmsurgery.methods.debias.pride import no_prior
        from llmsurgery.methods.label_offsets import FoldSettings, fold_offsets, label_offsets
        from llmsurgery.methods.letter_questions import ask_given, cyclic_subset, encode_given, named
        from llmsurgery.methods.priors import centred_offsets

        assert operation.choices is not None
        given = operation.choices
        empty = tuple(Question(text, (text,) * given.options, 0) for text in config.inputs)
        free = encode_given(operation.encoder, Choices(empty, given.options), config.template)
        # All orders of such a question are the same prompt.
        scores = ask_given(operation, free, keep_states=False).log_probabilities[:, 0]
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        prior = (probabilities / probabilities.sum(-1, keepdims=True)).mean(0)
        delta = config.fold.strength * centred_offsets(prior, config.target_prior)
        applied = np.clip(delta, -config.fold.cap, config.fold.cap)
        if not applied.any():
            raise no_prior()
        data = encode_given(operation.encoder, given, config.template)
        data = cyclic_subset(data, max(2, STATES // given.options))
        found = ask_given(operation, data)
        assert found.states is not None
        settings = FoldSettings(config.fold.route, config.fold.min_rho, config.fold.untie)
        states = found.states.reshape(-1, found.states.shape[-1])
        folded = fold_offsets(operation, label_offsets(data.tokens, applied), states, data.prompts, settings)
        record: dict[str, object] = {
            "prior": named(data.letters, prior),
            "offsets": named(data.letters, applied),
            "capped": bool((np.abs(delta) > config.fold.cap).any()),
            "template_sha256": data.template,
            **folded.record,
        }
        return MethodResult(folded.edits, record, folded.targets)
