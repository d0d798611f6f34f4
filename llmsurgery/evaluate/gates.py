"""Gates and stop rules: `metric<=value`, where the suffix `x` means times the value before. No heavy import."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmsurgery.errors import UsageError, unknown_name

_EXPRESSION = re.compile(r"^\s*([a-z_.]+)\s*(<=|>=)\s*([-+0-9.eE]+)(x?)\s*$")


@dataclass(frozen=True)
class Metric:
    """What a metric is, for tables and for the check before any work.

    Attributes:
        name: Name used in gates and JSON.
        direction: "lower" or "higher": what the operation wants.
        needs: Data options that it is computed from.
        help: One line.
    """

    name: str
    direction: str
    needs: str
    help: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("forget.token_prob", "lower", "forget", "mean probability of the answer tokens, end token left out"),
        Metric("forget.prob", "lower", "forget", "geometric mean probability of the answer, end token counted"),
        Metric("forget.rouge_l", "lower", "forget", "ROUGE-L recall of the greedy answer"),
        Metric("retain.token_prob", "higher", "retain", "mean probability of the answer tokens, end token left out"),
        Metric("retain.prob", "higher", "retain", "geometric mean probability of the answer, end token counted"),
        Metric("retain.rouge_l", "higher", "retain", "ROUGE-L recall of the greedy answer"),
        Metric("utility.ppl", "lower", "text", "perplexity on plain text"),
        Metric("utility.ppl_ratio", "lower", "text", "perplexity over the perplexity before"),
        Metric("utility.kl", "lower", "text", "KL divergence to the source model on plain text, nats per token"),
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


def parse_gate(text: str, available: set[str], generate: bool = True) -> Gate:
    """Parse one gate.

    Args:
        text: For example `forget.token_prob<=0.15x`.
        available: Data that is given ("forget", "retain", "text").
        generate: Whether answers are generated.

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
    needs = METRICS[name].needs
    if needs not in available:
        raise UsageError(
            f"{name} cannot be computed", f"it needs --{needs}, which is not given", f"give --{needs} or drop the gate"
        )
    if name.endswith(".rouge_l") and not generate:
        raise UsageError(f"{name} cannot be computed", "generation is switched off", "drop generate=false, or the gate")
    return Gate(name, operator, threshold, bool(relative))


def check_gates(gates: list[Gate], after: Mapping[str, float], before: Mapping[str, float]) -> list[GateOutcome]:
    """Check every gate against the figures after the operation."""
    outcomes = []
    for gate in gates:
        value, earlier = after[gate.metric], before.get(gate.metric)
        outcomes.append(GateOutcome(str(gate), gate.limit(earlier), value, gate.holds(value, earlier)))
    return outcomes
