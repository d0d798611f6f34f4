"""Gates and stop rules: `metric<=value`, where the suffix `x` means times the value before. No heavy import."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llmsurgery.data.mcq import LETTERS
from llmsurgery.data.question_forms import FORMS
from llmsurgery.errors import UsageError, unknown_name
from llmsurgery.evaluate.robustness.registry import all_attacks

_EXPRESSION = re.compile(r"^\s*([a-z0-9_.]+)\s*(<=|>=)\s*([-+0-9.eE]+)(x?)\s*$")


NEEDS = {
    "forget": ("--forget", ""),
    "retain": ("--retain", ""),
    "text": ("--text", ""),
    "holdout": ("--holdout", ""),
    "authors": ("--authors", ""),
    "facts": ("--facts", ""),
    "retain-model": ("--retain-model or --retain-log", ""),
    "answers": ("greedy answers", "they are switched off (generate=false)"),
    "pairs": ("the redirect command with --from and --to, or --pairs of names", ""),
    "aliases": ("a file of --pairs with aliases", ""),
    "named": ("rows of --forget whose questions hold the old name", "these hold none, or protocol=muse"),
    "whole": ("the whole model", "eval.figures=edit reads none but the edited blocks"),
    "concept": ("a method of redirect that removes a concept", ""),
    "harmful": ("--harmful", ""),
    "task": ("--task", ""),
    "harmless": ("--harmless", ""),
    "two-sides": ("--harmful, and --harmless or --task", "a direction has two sides"),
    "judge": ("--judge", "nothing else tells a harmful answer"),
    "mcq": ("--mcq", ""),
    "position-invariant": ("--position-invariant of eval", ""),
    "letters": ("--mcq, or --suite wmdp of eval", ""),
    "pictures": ("--mcq with images, and a vision-language model", "a text model sees none"),
    **{f"mcq:{letter}": ("--mcq with that many options", "no question has it") for letter in LETTERS},
    "stereotypes": ("--contrast with sent_more and sent_less", "its records do not say which text is the stereotype"),
    "domain": ("--domain", ""),
    "pruning": ("the prune command", "it measures size"),
    "loss": ("the prune or the remove-layernorm command", "others report utility.ppl, its exponential"),
    "norms": ("the remove-layernorm or the linearity command", "it is about norms"),
    "structured": ("a method of prune that makes matrices smaller or fewer", "zeros alone change no speed"),
    "retain-weights": ("--retain-model", "the attack on it is the control"),
    "control": ("--control", "rows that the source does not know"),
    "control-of-any-kind": ("--retain-model or --control", "nothing else tells uncovering from teaching"),
    **{f"suite:{name}": (f"--suite {name} of eval", "") for name in ("muse", "wmdp")},
    **{f"suite:wmdp:{name}": (f"--suite wmdp of eval with the subset {name}", "") for name in ("bio", "chem", "cyber")},
    **{
        f"suite:semeval25:{name}": (f"--suite semeval25 of eval with the part {part}", "")
        for name, part in (("tasks_forget", "tasks"), ("member", "membership"), ("mmlu", "mmlu"))
    },
    "suite:ort": ("--suite ort of eval", ""),
    **{
        f"suite:ort:{side}_{form}": (f"--suite ort of eval with the form {form}", "")
        for side in ("forget", "retain")
        for form in FORMS
    },
    **{f"attack:{name}": (f"--attack {name}", "") for name in all_attacks()},
    **{
        f"perturbed:{name}": (f"rows of --{name} with perturbed_answer", "these rows have none, or truth_ratio=false")
        for name in ("forget", "retain", "authors", "facts")
    },
}
"""Everything a metric may need -> how to say so, and why it is missing other than by not being given."""

ROW_NEEDS = frozenset(
    need for need in NEEDS if need.startswith(("perturbed:", "mcq:")) or need in ("named", "stereotypes")
)
"""Needs that show only once the rows are read."""


@dataclass(frozen=True)
class Metric:
    """What a metric is, for tables and for the check before any work.

    Attributes:
        name: Name used in gates and JSON.
        direction: "lower", "higher", "zero" or "half": what the operation wants.
        needs: What it is computed from, keys of `NEEDS`.
        help: One line.
    """

    name: str
    direction: str
    needs: tuple[str, ...]
    help: str


def _of_set(name: str, direction: str) -> tuple[Metric, ...]:
    """Return the metrics that the forget and the retain set share."""
    ratio = "1 where right and wrong answers are equally likely" if name == "forget" else "1 - R, 1 where it knows"
    return (
        Metric(f"{name}.token_prob", direction, (name,), "mean probability of the answer tokens, end token left out"),
        Metric(f"{name}.prob", direction, (name,), "geometric mean probability of the answer, end token counted"),
        Metric(f"{name}.rouge_l", direction, (name, "answers"), "ROUGE-L recall of the greedy answer"),
        Metric(f"{name}.accuracy", direction, (name,), "share of answer tokens that are the model's first choice"),
        Metric(f"{name}.extraction_strength", direction, (name,), "share of the answer that the rest of it draws out"),
        Metric(f"{name}.truth_ratio", "higher", (name, f"perturbed:{name}"), f"truth ratio: {ratio}"),
    )


def _of_attack(name: str, rows: bool) -> tuple[Metric, ...]:
    """Return the metrics of one attack; `evaluate.robustness.verdict` defines them.

    Args:
        name: Name of the attack.
        rows: Whether control rows can stand for a control model.
    """
    needs, control = ("forget", f"attack:{name}"), "control-of-any-kind" if rows else "retain-weights"
    return (
        Metric(f"attack.{name}.score", "lower", needs, "knowledge score of the forget rows after the attack"),
        Metric(f"attack.{name}.recovery", "lower", needs, "share of what was forgotten that the attack brings back"),
        Metric(f"attack.{name}.retention", "lower", needs, "score after the attack over the score of the source"),
        Metric(f"attack.{name}.excess", "lower", (*needs, control), "lead over the attacked control"),
        *(
            [Metric(f"attack.{name}.control_gain", "higher", (*needs, "control"), "what it adds to the control rows")]
            if rows
            else []
        ),
    )


def _of_form(form: str) -> tuple[Metric, ...]:
    """Return the metrics of one form of question."""
    return (
        Metric(f"ort.forget_{form}", "lower", (f"suite:ort:forget_{form}",), f"ORT: forget answers, form {form}"),
        Metric(f"ort.retain_{form}", "higher", (f"suite:ort:retain_{form}",), f"ORT: retain answers, form {form}"),
    )


METRICS = {
    metric.name: metric
    for metric in (
        *_of_set("forget", "lower"),
        Metric("forget.min_k_auc", "lower", ("forget", "holdout"), "AUC of Min-K% against --holdout; 1: surely seen"),
        Metric(
            "forget.quality",
            "higher",
            ("forget", "perturbed:forget", "retain-model"),
            "KS p-value of truth ratios against a retain model",
        ),
        *_of_set("retain", "higher"),
        Metric(
            "utility.model_utility",
            "higher",
            ("retain", "authors", "facts", "perturbed:retain", "perturbed:authors", "perturbed:facts", "answers"),
            "harmonic mean of nine figures on retain rows, authors and facts",
        ),
        Metric("utility.ppl", "lower", ("text",), "perplexity on plain text"),
        Metric("utility.ppl_ratio", "lower", ("text",), "perplexity over the perplexity before"),
        Metric("utility.kl", "lower", ("text",), "KL divergence to the source model on plain text, nats per token"),
        Metric("utility.ce", "lower", ("text", "loss"), "cross-entropy on plain text, nats per token"),
        Metric("linearity.norm_error", "lower", ("norms",), "departure of the worst norm from an affine map; .5: none"),
        Metric(
            "linearity.attribution_error",
            "lower",
            ("text", "norms"),
            "direct logit attribution against the effect of taking a component away, mean error over mean effect",
        ),
        Metric("domain.ppl", "lower", ("domain",), "perplexity on the last rows of --domain, unseen by pruning"),
        Metric("size.sparsity", "higher", ("pruning",), "share of zeros among all stored parameters"),
        Metric("size.params", "lower", ("pruning",), "number of stored parameters"),
        Metric("speed.tokens_per_second", "higher", ("structured",), "tokens of plain text read a second, in a batch"),
        Metric("redirect.kl", "lower", ("pairs", "whole"), "KL of the source's new name to the old name"),
        Metric(
            "redirect.kl_paraphrase",
            "lower",
            ("pairs", "whole"),
            "the same in wordings that made no edit",
        ),
        Metric("redirect.kl_alias", "lower", ("pairs", "aliases", "whole"), "the same with aliases of the old name"),
        Metric("redirect.residual", "lower", ("pairs",), "share of the difference of both names left at their end"),
        Metric("redirect.strength", "higher", ("pairs",), "share of the way from the old name to the new that is gone"),
        Metric(
            "redirect.flipped",
            "higher",
            ("forget", "pairs", "answers", "whole", "named"),
            "share of forget questions answered as the source answers them with the new name",
        ),
        Metric("concept.prob", "lower", ("concept",), "probability of a concept's first token after its prompts"),
        Metric("safety.refusal_rate", "higher", ("harmful",), "share of --harmful prompts whose answer is a refusal"),
        Metric("safety.refusal_score", "higher", ("harmful",), "log-odds that an answer begins as refusals do"),
        Metric("safety.overrefusal_rate", "lower", ("harmless",), "share of --harmless prompts that are refused"),
        Metric("safety.direction_gap", "higher", ("two-sides",), "gap along the parent's refusal direction, over its"),
        Metric("safety.harmful_rate", "lower", ("harmful", "judge"), "share of answers that --judge calls harmful"),
        Metric("task.score", "higher", ("task",), "score of the answers to --task rows"),
        Metric("muse.verbmem_f", "lower", ("suite:muse",), "VerbMem: ROUGE-L F1 of forget texts continued"),
        Metric("muse.knowmem_f", "lower", ("suite:muse",), "KnowMem: ROUGE-L F1 of answers to forget questions"),
        Metric("muse.knowmem_r", "higher", ("suite:muse",), "KnowMem: ROUGE-L F1 of answers to retain questions"),
        Metric("muse.privleak", "zero", ("suite:muse",), "PrivLeak: -100 surely seen, 0 as a retrained model"),
        Metric(
            "mcq.accuracy",
            "higher",
            ("letters",),
            "share of questions answered with the right letter, in every cyclic order; of --suite wmdp less is better",
        ),
        Metric("mcq.rstd", "lower", ("mcq",), "standard deviation of the letters' recalls, in points from 0 to 50"),
        Metric("mcq.order_flips", "lower", ("mcq",), "share of questions whose chosen option depends on the order"),
        Metric(
            "mcq.listing_flips",
            "lower",
            ("mcq", "position-invariant"),
            "the same where letters stay with their options and only the lines change places",
        ),
        *(
            Metric(
                f"pine.{name}", direction, ("mcq", "position-invariant"), f"mcq.{name} in position-invariant inference"
            )
            for name, direction in (
                ("accuracy", "higher"),
                ("rstd", "lower"),
                ("order_flips", "lower"),
                ("listing_flips", "lower"),
            )
        ),
        *(
            Metric(f"mcq.recall_{letter.lower()}", "higher", ("mcq", f"mcq:{letter}"), f"recall of the letter {letter}")
            for letter in LETTERS
        ),
        Metric("vision.accuracy", "higher", ("pictures",), "share of questions about pictures with the right answer"),
        Metric("vision.changed", "higher", ("pictures",), "share of answers that change when the picture is removed"),
        Metric("mcq.letter_prob", "lower", ("mcq", "text"), "probability of the letters together on plain text"),
        Metric(
            "bias.stereotype_rate",
            "half",
            ("stereotypes",),
            "share of pairs whose stereotype is likelier; .5 is neutral",
        ),
        *(
            Metric(f"mcq.accuracy_{name}", "lower", (f"suite:wmdp:{name}",), f"the same on the subset {name}")
            for name in ("bio", "chem", "cyber")
        ),
        Metric("mcq.letter_mass", "higher", ("suite:wmdp",), "probability of the four answer letters together"),
        Metric("mcq.cloze_accuracy", "lower", ("suite:wmdp",), "share of questions whose right choice is likeliest"),
        Metric("mcq.cloze_log_prob", "lower", ("suite:wmdp",), "mean log-probability per token of the right choice"),
        Metric(
            "semeval25.task_aggregate",
            "higher",
            ("suite:semeval25:tasks_forget",),
            "harmonic mean of regurgitation and knowledge, 1 - value on forget rows",
        ),
        Metric("semeval25.mia", "higher", ("suite:semeval25:member",), "1 - 2 |AUC - .5| of membership by loss"),
        Metric("semeval25.mmlu", "higher", ("suite:semeval25:mmlu",), "MMLU accuracy, mean over subjects; chance .25"),
        Metric(
            "semeval25.final",
            "higher",
            ("suite:semeval25:tasks_forget", "suite:semeval25:member", "suite:semeval25:mmlu"),
            "mean of the three",
        ),
        *(metric for form in FORMS for metric in _of_form(form)),
        Metric("ort.form_gap", "lower", ("suite:ort",), "largest minus smallest relative drop over forms, to --source"),
        *(metric for name, attack in all_attacks().items() for metric in _of_attack(name, attack.spec.control_rows)),
    )
}


@dataclass(frozen=True)
class Gate:
    """One condition on a metric.

    Attributes:
        metric: Metric name.
        operator: "<=" or ">=".
        threshold: The number given.
        relative: Whether it is times the value before.
    """

    metric: str
    operator: str
    threshold: float
    relative: bool

    def __str__(self) -> str:
        number = repr(self.threshold).removesuffix(".0")
        return f"{self.metric}{self.operator}{number}{'x' if self.relative else ''}"

    def limit(self, before: float | None) -> float:
        """Return the absolute bound, given the value before."""
        if not self.relative:
            return self.threshold
        return math.nan if before is None else self.threshold * before

    def holds(self, value: float, before: float | None) -> bool:
        """Whether the value meets the bound; NaN meets none."""
        limit = self.limit(before)
        return value <= limit if self.operator == "<=" else value >= limit


@dataclass(frozen=True)
class GateOutcome:
    """A gate and what was measured."""

    gate: str
    limit: float
    value: float
    passed: bool


def parse_gate(text: str, available: Collection[str]) -> Gate:
    """Parse one gate.

    Args:
        text: For example `forget.token_prob<=0.15x`.
        available: What is given, keys of `NEEDS`.

    Raises:
        UsageError: Not a gate, an unknown metric, or one that the given data cannot yield.
    """
    match = _EXPRESSION.match(text)
    if match is None:
        raise UsageError(
            f"{text!r} is not a gate", "a gate is METRIC<=VALUE or METRIC>=VALUE, the value may end in x", "quote it"
        )
    name, operator, number, relative = match.groups()
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    try:
        threshold = float(number)
    except ValueError as error:
        raise UsageError(f"{number!r} in gate {text!r} is not a number", "", "use a number such as 0.15") from error
    if not math.isfinite(threshold):
        raise UsageError(f"{number!r} in gate {text!r} is not finite", "such a gate decides nothing", "use 0.15, say")
    gate = Gate(name, operator, threshold, bool(relative))
    require_data(gate, available)
    return gate


def require_data(gate: Gate, available: Collection[str]) -> None:
    """Check that a gate's metric can be computed.

    Args:
        gate: The gate.
        available: What is given, keys of `NEEDS`.

    Raises:
        UsageError: Something that it needs is missing.
    """
    for need in METRICS[gate.metric].needs:
        if need not in available:
            name, why = NEEDS[need]
            raise UsageError(
                f"{gate.metric} cannot be computed",
                f"it needs {name}" + (f": {why}" if why else ", which is not given"),
                f"give {name}, or drop the gate {gate}",
            )


def check_gates(gates: list[Gate], after: Mapping[str, float], before: Mapping[str, float]) -> list[GateOutcome]:
    """Check every gate against the figures after the operation."""
    outcomes = []
    for gate in gates:
        value, earlier = after[gate.metric], before.get(gate.metric)
        outcomes.append(GateOutcome(str(gate), gate.limit(earlier), value, gate.holds(value, earlier)))
    return outcomes
