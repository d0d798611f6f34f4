"""Which neighbouring layers to write into: those that reach the target and change ordinary text least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation
from llmsurgery.methods.concepts import Writer, layer_of

if TYPE_CHECKING:
    from llmsurgery.arch.spec import RoleTensor

REACH = 0.05
"""Spans whose share of the divergence left differs by no more count as equal in it."""

CALM = 1.5
"""Spans whose disturbance of ordinary text is no larger than this times the least count as equal in it."""

SPANS, TEXTS, TEXT_TOKENS = 10, 8, 64
"""Spans that are tried at most, and the ordinary text that they are compared on."""

DEPTH = 1 / 8
"""Where the first layer of a span stands if nothing can be tried: layers 4 to 6 of 32 (arXiv 2506.07795)."""


def span_at_depth(targets: Sequence[RoleTensor], length: int, layers: int) -> list[RoleTensor]:
    """Return the span that begins nearest to an eighth of the depth.

    Args:
        targets: The matrices, in order of layer.
        length: Layers of a span.
        layers: Number of blocks of the model.
    """
    return min(_runs(targets, length), key=lambda run: abs(layer_of(run[0]) - round(DEPTH * layers)))


def spans_to_try(targets: Sequence[RoleTensor], length: int, layers: int) -> list[list[RoleTensor]]:
    """Return spans in the first two thirds of a model, at most `SPANS` of them, spread evenly; arguments as above."""
    runs = _runs(targets, length)
    early = [run for run in runs if 3 * layer_of(run[-1]) < 2 * layers] or runs[:1]
    return early[:: -(-len(early) // SPANS)]


def _runs(targets: Sequence[RoleTensor], length: int) -> list[list[RoleTensor]]:
    """Return all spans of neighbouring layers, shorter ones if none is as long as asked for."""
    for size in range(min(length, len(targets)), 0, -1):
        runs = [list(targets[i : i + size]) for i in range(len(targets) - size + 1)]
        if found := [run for run in runs if layer_of(run[-1]) - layer_of(run[0]) == size - 1]:
            return found
    return []


def choose_span(scores: Sequence[tuple[float, float]]) -> int:
    """Return the number of the earliest span, of those that reach about as far as the best and disturb about as little.

    Later spans may look as good after the contexts and still come too late: what blocks before them have read from the
    name goes on to the answer. On SmolLM2-135M the span that disturbed least of all came from layer 8 on and brought
    the answers down by a third, layers 4 to 6 by two thirds and more.

    Args:
        scores: Of each span the share of the divergence that is left, and what it does to ordinary text.
    """
    least = min(left for left, _ in scores)
    near = [number for number, (left, _) in enumerate(scores) if left <= least + REACH]
    calmest = min(scores[number][1] for number in near)
    return next(number for number in near if scores[number][1] <= CALM * calmest)


def search_span(
    operation: Operation, writer: Writer, spans: Sequence[Sequence[RoleTensor]]
) -> tuple[Sequence[RoleTensor], list[dict[str, object]]]:
    """Try spans on a loaded model; return the best one and what was found of each.

    Reach is the KL divergence left after the contexts, as a share of that before; what is disturbed is the KL
    divergence on ordinary text.

    Args:
        operation: What the method is given.
        writer: Writes the names.
        spans: The spans.
    """
    from llmsurgery.evaluate.disturbance import Disturbance
    from llmsurgery.evaluate.redirection import make_probes

    encoder = operation.encoder
    texts = [encoder.encode_text(row.answer, TEXT_TOKENS) for row in operation.data.get("text", ())]
    texts = [text for text in texts if len(text.ids) > 8][:TEXTS]
    probes = [probe for probe in make_probes(encoder, operation.pairs) if probe.kind == "template"]
    scale = Disturbance(operation.model, operation.structure, probes, texts, encoder.pad_id)
    tried: list[dict[str, object]] = []
    scores: list[tuple[float, float]] = []
    with operation.progress.task("trying layers", len(spans)) as tick:
        for span in spans:
            residual = writer.write(span).residual
            left, moved = scale.measure()
            writer.restore(span)
            scores.append((left, moved))
            layers = [layer_of(target) for target in span]
            tried.append({"layers": layers, "kl_left": left, "text_kl": moved, "residual": residual})
            tick()
    best = choose_span(scores)
    listed = ", ".join(str(layer_of(target)) for target in spans[best])
    operation.progress.notice(
        f"layers {listed} are edited: {scores[best][0]:.0%} of the divergence from the target is left after the "
        f"contexts, and ordinary text moves by {scores[best][1]:.2g} nats per token"
    )
    return spans[best], tried
