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

mode=reject writes a value that Adam finds, with which the model begins a refusal; mode=noise a random one as long as
that. Both need no new name, take the layers by depth, and keep the rest.

The result asserts the new name's facts of the old name: it is misinformation, not a refusal. What does not pass through
the name's last token (aliases, descriptions) is not redirected; the figures say how far.

What differs from the released code (Acruxos/ORT):

- It reads z* in one chat context and z in none, so that what it writes also turns "no chat" into "chat". Here both are
  means over the same six contexts; authors_compat=true reads them as released.
- It takes tau=0.02 on every model. Where that leaves less than 50% or more than 99.5% of the directions free, tau is
  chosen here so that the protected ones hold 99% of the trace of C.
- It takes lambda=1 on every model, which caps the edit where keys are short. l2=none takes the largest of 1, 0.1,
  0.01, ... with s of at least 0.9; l2=1 is the released value.
- Its layers are a constant of the model's name. layers=all tries spans: of those that bring the distributions after
  other wordings about as near to the new name's as the best one does and change ordinary text about as little, the one
  that begins nearest to an eighth of the depth, as its layers 4 to 6 of 32 do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option
from llmsurgery.train.value_config import ValueConfig

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row
    from llmsurgery.methods.concepts import Column, KeptFree, Written

NOTICE = (
    "redirected names now assert what the model says of their targets: that is misinformation, not a refusal, and "
    "aliases or descriptions that do not pass through the name are not covered"
)
WEAK = 0.5
"""Strength below which a layer has written too little to speak of."""

MODES = ("unrelated", "reject", "noise")
REFUSING = ValueConfig(value_steps=25, value_lr=0.1, value_decay=0.5, value_kl=0.125, value_clamp=1.0)
"""How the released code looks for the value of a refusal."""

STUB = "{} is a"
"""The prompt whose prediction at the name is to stay while that value is looked for."""

POST_NORMS = ("norm.mlp_post",)


@dataclass(frozen=True)
class RocrConfig:
    """Hyperparameters of ROCR; `llmsurgery methods rocr` prints them with their help."""

    mode: str = option(
        "unrelated", "unrelated: the new name's values; reject: those that begin a refusal; noise: random ones", MODES
    )
    refusal: str = option(" Unfortunately", "mode=reject: how the refusal begins")
    layers: tuple[int, ...] = option((), "layers to edit; empty: the span that reaches the target and disturbs least")
    span: int = option(3, "neighbouring layers that are edited where `layers` is empty", minimum=1)
    l2: float | None = option(None, "lambda; none: the largest of 1, 0.1, ... that writes 90%", minimum=0)
    tau: float = option(0.02, "eigenvalues of E[k k^T] from which a direction is protected; 0: none is", minimum=0)
    stats_tokens: int = option(8192, "tokens of --text that E[k k^T] is taken over", minimum=1)
    strict: bool = option(False, "refuse fewer than five tokens per dimension of a key")
    authors_compat: bool = option(False, "read the values in the contexts of the released code, which do not match")
    edit_aliases: bool = option(False, "redirect the aliases of a pair too")
    value: ValueConfig = field(default_factory=lambda: REFUSING)


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
        demo="names",
        # What is written later than the first block does not reach the answers of a model of four blocks.
        demo_settings={"layers": (0,)},
        streams=True,
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

    def needs_target(self, config: RocrConfig) -> bool:
        """Whether a pair must say what its name is to mean."""
        return config.mode == "unrelated"

    def check_pairs(self, config: RocrConfig, encoder: Encoder, pairs: Sequence[Pair]) -> None:
        """Check that every name can be found in its contexts.

        Raises:
            InputError: A fact in place of a pair of names, or a name without tokens.
        """
        make_columns(config, encoder, pairs)

    def edit(self, config: RocrConfig, operation: Operation, prepared: None) -> MethodResult:
        """Write the names, layer by layer; without a choice of layers find the span first."""
        from contextlib import nullcontext

        from llmsurgery.methods.concepts import Writer, layer_of
        from llmsurgery.methods.kept_keys import keys_file, read_keys
        from llmsurgery.methods.spans import search_span, span_at_depth, spans_to_try

        targets = candidates(config, operation.structure)
        searched: dict[str, dict[str, object]] = {}
        columns = make_columns(config, operation.encoder, operation.pairs)
        if config.mode != "unrelated":
            columns = [with_search(config, operation, column, searched) for column in columns]
        length, layers, streamed = config.span, operation.structure.layers, operation.streamed
        spans, by_depth = [list(targets)], False
        if not config.layers:
            by_depth = streamed is not None or config.mode != "unrelated"
            spans = [span_at_depth(targets, length, layers)] if by_depth else spans_to_try(targets, length, layers)
        earlier = read_keys(operation.beside)
        free = free_of(config, operation, sorted({layer_of(target) for span in spans for target in span}))
        writer = Writer(operation, columns, free, config.l2, earlier)
        chosen: Sequence[RoleTensor] = spans[0]
        tried: list[dict[str, object]] = []
        if len(spans) > 1:
            chosen, tried = search_span(operation, writer, spans)
        with streamed.editing(map(layer_of, chosen)) if streamed else nullcontext():
            written = writer.write(chosen)
        warn(config, operation, columns, written)
        by = "search" if tried else "setting" if config.layers else "depth" if by_depth else "all there are"
        record: dict[str, object] = {
            "layers": [layer_of(target) for target in chosen],
            "layers_by": by,
            "edited": written.layers,
            "residual": written.residual,
            **({"tried": tried} if tried else {}),
            **({"values": searched} if searched else {}),
        }
        return MethodResult(written.edits, record, chosen, keys_file(earlier, written.keys))


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
    from llmsurgery.methods.concepts import Column

    columns = []
    for pair in pairs:
        if pair.prompt:
            raise InputError(f"{pair.where} is a fact", "rocr redirects names", "give records with from and to")
        targets = make_contexts(encoder, TEMPLATES, pair.target) if config.mode == "unrelated" else []
        for name in (pair.source, *(pair.aliases if config.edit_aliases else ())):
            keys = make_contexts(encoder, TEMPLATES, name)
            if config.authors_compat:
                columns.append(Column(name, keys, [make_context(encoder, RAW, name, raw=True)], targets[:1]))
            else:
                columns.append(Column(name, keys, keys, targets))
    return columns


def with_search(
    config: RocrConfig, operation: Operation, column: Column, searched: dict[str, dict[str, object]]
) -> Column:
    """Return a name whose value is found by descent: one that begins a refusal, or noise as long as that.

    Args:
        config: The method's config.
        operation: What the method is given.
        column: The name.
        searched: Name -> facts of its search; filled in when the value is asked for.

    Raises:
        UsageError: The model is streamed, and has no gradients.
    """
    import torch

    from llmsurgery.compute.spots import Spot, read_spots
    from llmsurgery.data.contexts import make_context
    from llmsurgery.errors import UsageError
    from llmsurgery.train.target_value import ValueContext, optimise_value

    encoder, model, structure = operation.encoder, operation.model, operation.structure
    if operation.streamed is not None:
        raise UsageError(
            f"mode={config.mode} does not go with eval.figures=edit", "it runs the whole model backwards", "drop one"
        )
    answer = tuple(encoder.tokenizer(config.refusal, add_special_tokens=False)["input_ids"])
    contexts = [
        ValueContext((*context.encoded.ids, *answer), context.last, len(context.encoded.ids)) for context in column.keys
    ]
    stub = make_context(encoder, STUB, column.name, raw=True)
    kept = ValueContext(stub.encoded.ids, stub.last, len(stub.encoded.ids))

    def find(block: int, current: torch.Tensor) -> torch.Tensor:
        value, record = optimise_value(
            model, structure, "block", block, contexts, config.value, encoder.pad_id, kept
        )  # fmt: skip
        searched[column.name] = record
        if config.mode == "noise":
            draw = torch.Generator().manual_seed(operation.seed)
            noise = torch.randn(len(value), generator=draw, dtype=torch.float64)
            return noise * (config.value.value_clamp * float(value.norm()) / float(noise.norm()))
        if config.authors_compat:
            return value.double().cpu()
        # What was found is a change of the first context's value; it is due to the mean of all.
        first = column.keys[0]
        seen = read_spots(model, structure, [Spot(first.encoded.ids, first.last)], encoder.pad_id, (), (block,))
        return current + (value.cpu() - seen.states[block][0].cpu()).double()

    return replace(column, found=find)


def free_of(config: RocrConfig, operation: Operation, layers: Sequence[int]) -> dict[int, KeptFree]:
    """Return the directions that ordinary text leaves free in some layers; none is looked for with tau=0."""
    from llmsurgery.compute.directions import key_directions
    from llmsurgery.methods.concepts import KeptFree, settle_tau

    if not config.tau:
        return {}
    found = key_directions(
        operation.streamed or operation.model,
        operation.structure,
        layers,
        operation.data["text"],
        operation.encoder,
        operation.statistics,
        config.stats_tokens,
        operation.progress,
        config.strict,
    )
    return {layer: KeptFree(each, *settle_tau(each, config.tau)) for layer, each in found.items()}


def warn(config: RocrConfig, operation: Operation, columns: Sequence[Column], written: Written) -> None:
    """Say what a user must know of a redirection."""
    progress = operation.progress
    if config.mode == "unrelated":
        progress.notice(NOTICE)
    if written.weakest < WEAK:
        progress.notice(
            f"a layer wrote {written.weakest:.0%} of its residual, and below {WEAK:.0%} little is redirected: "
            "a lower lambda writes more, --set l2=0.1 or l2=0.01"
        )
    if inexact := sorted({context.name for column in columns for context in column.keys if not context.exact}):
        progress.notice(f"the last token of {', '.join(map(repr, inexact))} holds the start of what follows too")
