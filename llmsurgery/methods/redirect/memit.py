"""MEMIT: write many facts into the MLPs of several neighbouring layers at once.

Paper: "Mass-Editing Memory in a Transformer", arXiv 2210.07229. For every fact a value z of the residual stream after
the last edited block, at the subject's last token, is looked for that makes the model give the new answer
(`llmsurgery.train.target_value`). Then, for l of the edited layers, ascending, and on the model as edited so far,
with h the present value of that stream, K the keys of all facts in layer l and C_l = E[k k^T] over ordinary text:

    R = (Z - H) / (layers left, l included)
    W_l += R K^T (weight C_l + K K^T)^-1

A key is the mean of two: that of the bare prompt, and the mean after openings that the model makes of "The",
"Therefore", "Because", "I" and "You". `weight` is the number of tokens of ordinary text that C, a mean, is worth: the
larger, the less is written and the less is disturbed. At most as many singular directions change as there are keys.

What is written (`target`) is as for `rome`; target=erase takes R = -gamma W_l K in every layer.

What differs from the released code (kmeng01/memit), and why:

- It has layers per model: 13-17 of 48, 3-8 of 28. Here a span of an eighth of the depth, at most 5 layers, is taken
  where the subject's MLP outputs restore most in a causal trace.
- weight is 15,000 to 20,000 there. That leaves little of a fact in models whose keys are short: weight=none takes the
  largest of 20,000, 2,000, ... at which the first layer writes 90% of its share.
- Facts with one and the same key share one value; released, the mean of contradicting updates is written.
- See `rome` on the second moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.concepts import ENOUGH, layer_of
from llmsurgery.methods.facts import SEARCH, FactConfig, SpanConfig, find_matrices, make_rewrites, plan_facts
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option
from llmsurgery.train.value_config import ValueConfig

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row

WEIGHT = 20000.0


@dataclass(frozen=True)
class MemitConfig:
    """Hyperparameters of MEMIT; `llmsurgery methods memit` prints them with their help."""

    weight: float | None = option(
        None, "lambda, the tokens of text that C is worth; none: the largest that writes 90%", minimum=0
    )
    spans: SpanConfig = field(default_factory=SpanConfig)
    facts: FactConfig = field(default_factory=FactConfig)
    search: ValueConfig = field(default_factory=lambda: SEARCH)


@register
class Memit:
    """MEMIT as a method of the toolkit."""

    spec = MethodSpec(
        name="memit",
        task="redirect",
        summary="write many facts at once into the MLPs of a few neighbouring layers, in closed form",
        paper="Mass-Editing Memory in a Transformer, arXiv 2210.07229",
        needs=("pairs",),
        export="plain",
        trained=False,
        selects=True,
        roles=("mlp.down",),
        lacks=("norm.mlp_post",),
        presets={"released": {"span": 5, "weight": WEIGHT}},
    )
    config_type = MemitConfig

    def plan(self, config: MemitConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may be written.

        Raises:
            UnsupportedError: No dense MLP, or a norm after it.
        """
        return find_matrices(structure, config.spans.layers)

    def prepare(self, config: MemitConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: pairs are checked by `check_pairs`."""

    def check_pairs(self, config: MemitConfig, encoder: Encoder, pairs: Sequence[Pair]) -> None:
        """Check that every fact can be encoded.

        Raises:
            InputError: A subject or answer without tokens of its own.
        """
        make_rewrites(config.facts, encoder, pairs)

    def edit(self, config: MemitConfig, operation: Operation, prepared: None) -> MethodResult:
        """Choose the layers, look for the values, and write them layer by layer."""
        from llmsurgery.methods.fact_writing import find_statistics, solver, write_layers

        plan = plan_facts(operation, config.facts, config.spans)
        statistics = find_statistics(operation, config.facts, plan.chosen)
        weight: list[float] = [] if config.weight is None else [config.weight]

        def update(
            target: RoleTensor, keys: torch.Tensor, residuals: torch.Tensor
        ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, object]]:
            from llmsurgery.compute.associative import insert_factors

            solve, facts = solver(statistics[layer_of(target)])
            solved = solve(keys)
            inner = (solved * keys).sum(0)
            if not weight:
                weight.append(largest_weight(float(inner.min())))
            factors = insert_factors(keys, residuals, lambda _: solved, weight[0])
            return factors, {"weight": weight[0], "inner": inner.tolist(), **facts}

        edits, written = write_layers(operation, config.facts, config.search, plan.chosen, plan.rewrites, update)
        return MethodResult(edits, plan.record | written, plan.chosen)


def largest_weight(inner: float) -> float:
    """Return the largest of 20,000, 2,000, ... at which a key with this k^T C^-1 k gets 90% of its residual.

    One key gets the share q / (lambda + q).
    """
    weight = WEIGHT
    while weight > 1e-12 and inner / (weight + inner) < ENOUGH:
        weight /= 10
    return weight
