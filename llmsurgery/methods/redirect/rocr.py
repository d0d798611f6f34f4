"""ROCR: point a name at another one, so that every form of question about it reads the other's meaning.

Paper: "LLM Unlearning Should Be Form-Independent", arXiv 2506.07795. No training in the default mode, no data.

With k_l the input of the MLP's last matrix W_l at the last token of the old name, z that token's residual stream after
the last edited block, both means over six contexts, z* the same of z with the new name, and V_l the eigenvectors of
C_l = E[k k^T] over ordinary text with eigenvalues of at least tau:

    for layer i of n, on the model as edited so far:
        r = (z* - z) / (n - i),    q = k - V (V^T k)
        W += r q^T / (lambda + k^T q)

    s = k^T q / (lambda + k^T q)      the share of r that is written, measured again after rounding

Several names at once are columns of K and R: W += R (lambda I + K^T P K)^-1 K^T P. Names redirected earlier (their keys
are kept beside the result) and, among them, those of this file are further columns with nothing to write.

The result asserts the new name's facts of the old name: it is misinformation, not a refusal. What does not pass through
the name's last token (aliases, descriptions) is not redirected; the figures say how far.

What differs from the released code (Acruxos/ORT):

- It reads z* in one chat context and z in none, so that what it writes also turns "no chat" into "chat". Here both are
  means over the same six contexts; authors_compat=true reads them as released.
- It takes tau=0.02 on every model. Where that leaves less than 50% or more than 99.5% of the directions free, tau is
  chosen here so that the protected ones hold 99% of the trace of C.
- It takes lambda=1 on every model, which caps the edit where keys are short. l2=none takes the largest of 1, 0.1,
  0.01, ... with s of at least 0.9; l2=1 is the released value.
- Its layers are a constant of the model's name. layers=all tries spans: of those that bring the distributions after the
  contexts about as near to the new name's as the best one does, that which changes ordinary text least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.spots import Runner
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.contexts import Context
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import LowRank

NOTICE = (
    "redirected names now assert what the model says of their targets: that is misinformation, not a refusal, and "
    "aliases or descriptions that do not pass through the name are not covered"
)
WEAK = 0.5
"""Strength below which a layer has written too little to speak of."""

ENOUGH = 0.9
"""Strength that l2=none asks for."""

POST_NORMS = ("norm.mlp_post",)

REACH = 0.05
"""Spans whose share of the divergence left differs by no more count as equal in it."""

SPANS, TEXTS, TEXT_TOKENS = 10, 8, 64
"""Spans that are tried at most, and the ordinary text that they are compared on."""


@dataclass(frozen=True)
class RocrConfig:
    """Hyperparameters of ROCR; `llmsurgery methods rocr` prints them with their help."""

    layers: tuple[int, ...] = option((), "layers to edit; empty: the span that reaches the target and disturbs least")
    span: int = option(3, "neighbouring layers that are edited where `layers` is empty", minimum=1)
    l2: float | None = option(None, "lambda; none: the largest of 1, 0.1, ... that writes 90%", minimum=0)
    tau: float = option(0.02, "eigenvalues of E[k k^T] from which a direction is protected", minimum=0)
    authors_compat: bool = option(False, "read the values in the contexts of the released code, which do not match")
    edit_aliases: bool = option(False, "redirect the aliases of a pair too")


@dataclass(frozen=True)
class Column:
    """One name with its contexts, and those of the name that it is to mean."""

    name: str
    keys: list[Context]
    values: list[Context]
    targets: list[Context]


@dataclass
class Written:
    """What a span of layers wrote."""

    edits: list[LowRank] = field(default_factory=list)
    layers: list[dict[str, object]] = field(default_factory=list)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    weakest: float = 1.0
    residual: float = 1.0


@register
class Rocr:
    """ROCR as a method of the toolkit."""

    spec = MethodSpec(
        name="rocr",
        task="redirect",
        summary="make a name mean another one in the MLPs of a few early layers, without training or data",
        paper="LLM Unlearning Should Be Form-Independent, arXiv 2506.07795",
        needs=("pairs",),
        export="plain",
        trained=False,
        selects=True,
        roles=("mlp.down",),
        lacks=POST_NORMS,
        presets={"paper": {"l2": 1.0, "authors_compat": True}},
    )
    config_type = RocrConfig

    def plan(self, config: RocrConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may be written; with layers=all one span of them is.

        Raises:
            UnsupportedError: No dense MLP, or a norm after it.
        """
        return candidates(config, structure)

    def prepare(self, config: RocrConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No rows are needed: pairs are checked by `check_pairs`."""

    def check_pairs(self, config: RocrConfig, encoder: Encoder, pairs: Sequence[Pair]) -> None:
        """Check that every name can be found in its contexts.

        Raises:
            InputError: A fact in place of a pair of names, or a name without tokens.
        """
        make_columns(config, encoder, pairs)

    def edit(self, config: RocrConfig, operation: Operation, prepared: None) -> MethodResult:
        """Write the names, layer by layer; without a choice of layers find the span first."""
        from llmsurgery.compute.spots import LoadedModel

        targets = candidates(config, operation.structure)
        columns = make_columns(config, operation.encoder, operation.pairs)
        writer = _Writer(config, operation, LoadedModel(operation.model, operation.structure), columns)
        writer.protect(targets)
        tried: list[dict[str, object]] = []
        if config.layers or len(targets) <= config.span:
            chosen = list(targets)
        else:
            chosen, tried = _search(config, operation, writer, targets)
        written = writer.write(chosen)
        progress = operation.progress
        progress.notice(NOTICE)
        if written.weakest < WEAK:
            progress.notice(
                f"a layer wrote {written.weakest:.0%} of its residual (strength below {WEAK:.0%}): "
                "lower lambda, --set l2=0.1 or 0.01"
            )
        if inexact := sorted({context.name for column in columns for context in column.keys if not context.exact}):
            progress.notice(f"the last token of {', '.join(map(repr, inexact))} holds the start of what follows too")
        record: dict[str, object] = {
            "layers": [target.layer for target in chosen],
            "chosen_by": "search" if tried else "setting" if config.layers else "all there are",
            "edited": written.layers,
            "residual": written.residual,
        }
        return MethodResult(written.edits, record | ({"tried": tried} if tried else {}), chosen)


def candidates(config: RocrConfig, structure: Structure) -> list[RoleTensor]:
    """Return the matrices that may be written, in order of layer.

    Raises:
        UnsupportedError: The model has no dense MLP, or a norm stands after its MLPs.
    """
    from llmsurgery.errors import UnsupportedError

    if set(POST_NORMS) & set(structure.roles):
        raise UnsupportedError(
            f"{structure.family.name} has a norm after its MLPs",
            "what the matrix writes is scaled by the norm before it reaches the residual stream",
            "use another model",
        )
    if "mlp.down" not in structure.roles:
        raise UnsupportedError(
            "the model has no dense MLP",
            "its blocks have routed experts, and no matrix that every token goes through",
            "use another model",
        )
    return structure.select(("mlp.down",), config.layers or None)


def make_columns(config: RocrConfig, encoder: Encoder, pairs: Sequence[Pair]) -> list[Column]:
    """Return the contexts of every name.

    Raises:
        InputError: A fact in place of a pair of names, a name without tokens, or one that does not fit.
    """
    from llmsurgery.data.contexts import RAW, TEMPLATES, make_context, make_contexts
    from llmsurgery.errors import InputError

    columns = []
    for pair in pairs:
        if pair.prompt:
            raise InputError(f"{pair.where} is a fact", "rocr redirects names", "give records with from and to")
        targets = make_contexts(encoder, TEMPLATES, pair.target)
        for name in (pair.source, *(pair.aliases if config.edit_aliases else ())):
            keys = make_contexts(encoder, TEMPLATES, name)
            if config.authors_compat:
                columns.append(Column(name, keys, [make_context(encoder, RAW, name, raw=True)], targets[:1]))
            else:
                columns.append(Column(name, keys, keys, targets))
    return columns


class _Writer:
    """Writes names into the MLPs of a model in memory, and can take it back.

    Args:
        config: The method's config.
        operation: What the method is given.
        runner: The model.
        columns: The names.
    """

    def __init__(self, config: RocrConfig, operation: Operation, runner: Runner, columns: Sequence[Column]) -> None:
        self.config, self.operation, self.runner, self.columns = config, operation, runner, columns
        self.protected: dict[int, torch.Tensor] = {}
        self.free: dict[int, dict[str, object]] = {}

    def protect(self, targets: Sequence[RoleTensor]) -> None:
        """Find the directions that ordinary text uses."""
        from llmsurgery.evaluate.keys import key_second_moment

        operation, encoder = self.operation, self.operation.encoder
        texts = [encoder.encode_text(row.answer, 256) for row in operation.data.get("text", ())]
        for target in targets:
            second = key_second_moment(
                self.runner.model, target, texts, encoder.pad_id, operation.progress, f"keys of layer {target.layer}"
            )
            layer = _layer(target)
            self.protected[layer], self.free[layer] = protected_basis(second.value(), self.config.tau)
            self.free[layer]["tokens"] = second.count

    def look(self, target: RoleTensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys [inputs, names] at a layer and the current values [width, names] after a block, fp64."""
        keys = self._mean([column.keys for column in self.columns], target, None)
        values = self._mean([column.values for column in self.columns], None, block)
        return keys, values

    def _mean(self, groups: Sequence[Sequence[Context]], target: RoleTensor | None, block: int | None) -> torch.Tensor:
        """Return the mean over the contexts of each group [size, groups] of a matrix's input or a block's output."""
        import torch

        from llmsurgery.compute.spots import Spot, read_spots

        spots = [Spot(context.encoded.ids, context.last) for group in groups for context in group]
        targets, blocks = [target] if target is not None else [], [block] if block is not None else []
        pad_id = self.operation.encoder.pad_id
        seen = read_spots(self.runner, self.operation.structure, spots, pad_id, targets, blocks)
        (found,) = (seen.keys or seen.states).values()
        parts = found.double().split([len(group) for group in groups])
        return torch.stack([part.mean(0) for part in parts], 1).cpu()

    def write(self, targets: Sequence[RoleTensor]) -> Written:
        """Write the names into some neighbouring layers of the model in memory."""
        from llmsurgery.edits.kinds import LowRank

        result = Written()
        last = _layer(targets[-1])
        wanted = self._mean([column.targets for column in self.columns], None, last)
        start: torch.Tensor | None = None
        for number, target in enumerate(targets):
            layer = _layer(target)
            keys, values = self.look(target, last)
            start = values if start is None else start
            residuals = (wanted - values) / (len(targets) - number)
            edit, record, shares = self._write_one(target, keys, residuals)
            result.edits.append(LowRank(target.stored, *edit))
            result.keys[layer] = keys
            result.layers.append(record)
            result.weakest = min(result.weakest, *shares)
            left = self._mean([column.values for column in self.columns], None, last)
            result.residual = float(((wanted - left).norm(dim=0) / (wanted - start).norm(dim=0)).mean())
            record["residual"] = result.residual
        return result

    def _write_one(
        self, target: RoleTensor, keys: torch.Tensor, residuals: torch.Tensor
    ) -> tuple[tuple[Any, Any], dict[str, object], list[float]]:
        from llmsurgery.compute.associative import oriented, project_out, redirect_factors, update_norm
        from llmsurgery.compute.live import write_low_rank

        protected = self.protected.get(_layer(target))
        free = (keys.double() * project_out(keys, protected)).sum(0)
        l2 = self.config.l2 if self.config.l2 is not None else largest_l2(float(free.min()))
        left, right = redirect_factors(keys, residuals, protected, l2)
        u, v = oriented(left, right, target.transposed)
        stored = self.operation.read(target.stored)
        added = write_low_rank(self.operation.model, target, stored, u, v, keys)
        shares = ((added * residuals).sum(0) / residuals.square().sum(0)).tolist()
        record = {
            "layer": _layer(target),
            "lambda": l2,
            "free_key": free.tolist(),
            "strength": shares,
            "norm": update_norm(left, right),
            **self.free.get(_layer(target), {}),
        }
        return (u.numpy(), v.numpy()), record, shares

    def restore(self, targets: Sequence[RoleTensor]) -> None:
        """Put the stored values back."""
        import torch

        from llmsurgery.compute.view import weight_view

        for target in targets:
            weight_view(self.operation.model, target).copy_(torch.from_numpy(self.operation.read(target.stored)))


def _layer(target: RoleTensor) -> int:
    assert target.layer is not None
    return target.layer


def protected_basis(second: torch.Tensor, tau: float) -> tuple[torch.Tensor, dict[str, object]]:
    """Return the eigenvectors [size, b] of C with eigenvalues of at least tau, and what is said of the choice.

    Where less than half or more than 99.5% of the directions would be free, tau is chosen so that the protected ones
    hold 99% of the trace.

    Args:
        second: C [size, size].
        tau: The threshold.
    """
    import torch

    values, vectors = torch.linalg.eigh(second.double())
    free = int((values < tau).sum())
    size, chosen = len(values), "given"
    if tau > 0 and not 0.5 <= free / size <= 0.995:
        total = values.flip(0).clamp(min=0).cumsum(0)
        held = int(torch.searchsorted(total, 0.99 * total[-1])) + 1
        free, chosen = size - held, "99% of the trace"
        tau = float(values[free])
    return vectors[:, free:], {"tau": tau, "tau_by": chosen, "free_directions": free, "directions": size}


def largest_l2(free: float, enough: float = ENOUGH) -> float:
    """Return the largest of 1, 0.1, 0.01, ... with free / (lambda + free) of at least `enough`.

    Args:
        free: k^T P k of the key that has the least of it.
        enough: The share to be written.
    """
    import math

    highest = free * (1 - enough) / enough
    return 1.0 if highest >= 1 else 10.0 ** math.floor(math.log10(max(highest, 1e-12)))


def _search(
    config: RocrConfig, operation: Operation, writer: _Writer, targets: Sequence[RoleTensor]
) -> tuple[list[RoleTensor], list[dict[str, object]]]:
    """Try spans of neighbouring layers and return the best one, and what was found of each.

    Reach is the KL divergence left after the contexts, as a share of that before; what is disturbed is the KL
    divergence on ordinary text. Spans within REACH of the best reach count as equal in it.
    """
    from llmsurgery.compute.spots import LoadedModel
    from llmsurgery.evaluate.disturbance import Disturbance
    from llmsurgery.evaluate.redirection import make_probes

    encoder, structure = operation.encoder, operation.structure
    texts = [encoder.encode_text(row.answer, TEXT_TOKENS) for row in operation.data.get("text", ())]
    texts = [text for text in texts if len(text.ids) > 8][:TEXTS]
    probes = [probe for probe in make_probes(encoder, operation.pairs) if probe.kind == "template"]
    scale = Disturbance(LoadedModel(operation.model, structure), structure, probes, texts, encoder.pad_id)
    spans = spans_of(targets, config.span, structure.layers)
    tried: list[dict[str, object]] = []
    scores: list[tuple[float, float]] = []
    with operation.progress.task("trying layers", len(spans)) as tick:
        for span in spans:
            written = writer.write(span)
            scores.append(scale.measure())
            writer.restore(span)
            tick()
            tried.append(
                {
                    "layers": [target.layer for target in span],
                    "kl_left": scores[-1][0],
                    "text_kl": scores[-1][1],
                    "residual": written.residual,
                }
            )
    best = choose_span(scores)
    layers = ", ".join(str(target.layer) for target in spans[best])
    operation.progress.notice(
        f"layers {layers} are edited: {scores[best][0]:.0%} of the divergence from the target is left, and ordinary "
        f"text moves by {scores[best][1]:.2g} nats per token"
    )
    return spans[best], tried


def spans_of(targets: Sequence[RoleTensor], length: int, layers: int) -> list[list[RoleTensor]]:
    """Return spans of neighbouring layers in the first two thirds of a model, at most SPANS of them, spread evenly.

    Args:
        targets: The matrices, in order of layer.
        length: Layers of a span.
        layers: Number of blocks of the model.
    """
    runs = [list(targets[i : i + length]) for i in range(len(targets) - length + 1)]
    found = [run for run in runs if _layer(run[-1]) - _layer(run[0]) == length - 1]
    early = [run for run in found if 3 * _layer(run[-1]) < 2 * layers] or found[:1] or [list(targets)]
    step = max(1, -(-len(early) // SPANS))
    return early[::step]


def choose_span(scores: Sequence[tuple[float, float]]) -> int:
    """Return the number of the span that disturbs least, of those that reach about as far as the best.

    Args:
        scores: Of each span the share of the divergence that is left, and what it does to ordinary text.
    """
    least = min(left for left, _ in scores)
    return min((number for number, (left, _) in enumerate(scores) if left <= least + REACH), key=lambda n: scores[n][1])
