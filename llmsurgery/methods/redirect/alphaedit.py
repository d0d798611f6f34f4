"""Null-space editing: write many facts as MEMIT does, where keys of ordinary text do not reach.

After AlphaEdit ("AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", arXiv 2410.02355), whose
machinery arXiv 2506.07795 uses too; the form here is this project's, with C^-1 of the rank-one edit replaced by a
projector. With V the eigenvectors of C_l = E[k k^T] over ordinary text with eigenvalues of at least tau, P = I - V V^T,
Z, H and K as for `memit`, and for l of the edited layers in ascending order:

    R = (Z - H) / (layers left, l included)
    W_l += R (lambda I + K^T P K)^-1 K^T P

Nothing that lies in the span of V notices. Facts may be written `batch` at a time: keys of earlier batches are then
further columns of K whose residuals are zero, so that later facts leave them alone. So are the keys of earlier runs of
this method and of `rocr`, which are kept beside a result.

    s = k^T P k / (lambda + k^T P k)      the share of R that one key gets

What is written (`target`) is as for `rome`; target=erase takes R = -gamma W_l K in every layer.

What differs from the released code (jianghoucheng/AlphaEdit), and why:

- tau=0.02 is absolute there. Where that leaves less than half or more than 99.5% of the directions free, the protected
  ones hold 99% of the trace of C here.
- lambda is 1 or 10 per model there. l2=none takes the largest of 1, 0.1, ... with which the first layer
  writes 90% of its share.
- The projector is never made: V is kept, and K^T P K is as large as the number of keys.
- Layers, openings and values are those of `memit` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.concepts import free_directions, largest_lambda, layer_of
from llmsurgery.methods.facts import SEARCH, FactConfig, SpanConfig, find_matrices, make_rewrites, plan_facts
from llmsurgery.methods.kept_keys import keys_file, read_keys
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option
from llmsurgery.train.value_config import ValueConfig

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class AlphaEditConfig:
    """Hyperparameters of null-space editing; `llmsurgery methods alphaedit` prints them with their help."""

    tau: float = option(0.02, "eigenvalues of E[k k^T] from which a direction is protected", minimum=0)
    l2: float | None = option(None, "lambda; none: the largest of 1, 0.1, ... that writes 90%", minimum=0)
    batch: int = option(0, "facts that are written at a time; 0: all", minimum=0)
    spans: SpanConfig = field(default_factory=SpanConfig)
    facts: FactConfig = field(default_factory=FactConfig)
    search: ValueConfig = field(default_factory=lambda: SEARCH)


@register
class AlphaEdit:
    """Null-space editing as a method of the toolkit."""

    spec = MethodSpec(
        name="alphaedit",
        task="redirect",
        summary="write many facts into the MLPs of a few layers, in the null space of what ordinary text uses",
        paper="AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv 2410.02355",
        needs=("pairs",),
        export="plain",
        trained=False,
        selects=True,
        roles=("mlp.down",),
        lacks=("norm.mlp_post",),
        presets={"released": {"span": 5, "l2": 1.0}},
    )
    config_type = AlphaEditConfig

    def plan(self, config: AlphaEditConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may be written.

        Raises:
            UnsupportedError: No dense MLP, or a norm after it.
        """
        return find_matrices(structure, config.spans.layers)

    def prepare(self, config: AlphaEditConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: pairs are checked by `check_pairs`."""

    def check_pairs(self, config: AlphaEditConfig, encoder: Encoder, pairs: Sequence[Pair]) -> None:
        """Check that every fact can be encoded.

        Raises:
            InputError: A subject or answer without tokens of its own.
        """
        make_rewrites(config.facts, encoder, pairs)

    def edit(self, config: AlphaEditConfig, operation: Operation, prepared: None) -> MethodResult:
        """Choose the layers, look for the values, and write them layer by layer."""
        from llmsurgery.methods.fact_writing import find_statistics, write_layers

        plan = plan_facts(operation, config.facts, config.spans)
        statistics = find_statistics(operation, config.facts, plan.chosen)
        free = {layer: free_directions(of_layer, config.tau) for layer, of_layer in statistics.items()}
        kept = read_keys(operation.beside)
        earlier = {layer: keys.double() for layer, keys in kept.items()}
        own: dict[int, torch.Tensor] = {}
        l2: list[float] = [] if config.l2 is None else [config.l2]

        def update(
            target: RoleTensor, keys: torch.Tensor, residuals: torch.Tensor
        ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, object]]:
            import torch

            from llmsurgery.compute.associative import project_out, redirect_factors

            layer = layer_of(target)
            protected, before = free[layer].protected, earlier.get(layer)
            inner = (keys * project_out(keys, protected)).sum(0)
            if not l2:
                l2.append(largest_lambda(float(inner.min())))
            factors = redirect_factors(keys, residuals, protected, l2[0], before)
            earlier[layer] = keys if before is None else torch.cat([before, keys], 1)
            own[layer] = keys if layer not in own else torch.cat([own[layer], keys], 1)
            facts = {"lambda": l2[0], "free_key": inner.tolist(), **free[layer].record}
            return factors, facts | {"earlier_keys": 0 if before is None else before.shape[1]}

        batch = config.batch or len(plan.rewrites)
        edits, written = write_layers(operation, config.facts, config.search, plan.chosen, plan.rewrites, update, batch)
        return MethodResult(edits, plan.record | written, plan.chosen, keys_file(kept, own))
