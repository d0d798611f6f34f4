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
"""Where the first layer of a span stands if nothing else decides: layers 4 to 6 of 32 (arXiv 2506.07795)."""


def span_at_depth(targets: Sequence[RoleTensor], length: int, layers: int) -> list[RoleTensor]:
    """Return the span that begins nearest to an eighth of the depth.

    Args:
        targets: The matrices, in order of layer.
        length: Layers of a span.
        layers: Number of blocks of the model.
    """
    runs = _runs(targets, length)
    return runs[nearest_to_depth([layer_of(run[0]) for run in runs], layers)]


def nearest_to_depth(firsts: Sequence[int], layers: int) -> int:
    """Return the number of the span whose first layer is nearest to an eighth of the depth, the earlier of two.

    Args:
        firsts: First layer of each span, ascending.
        layers: Number of blocks of the model.
    """
    wanted = round(DEPTH * layers)
    return min(range(len(firsts)), key=lambda number: abs(firsts[number] - wanted))


def spans_to_try(targets: Sequence[RoleTensor], length: int, layers: int) -> list[list[RoleTensor]]:
    """Return spans in the first two thirds of a model, at most `SPANS` of them, spread evenly; arguments as above.

    The one nearest to an eighth of the depth is among them.
    """
    runs = _runs(targets, length)
    early = [run for run in runs if 3 * layer_of(run[-1]) < 2 * layers] or runs[:1]
    step = -(-len(early) // SPANS)
    return early[nearest_to_depth([layer_of(run[0]) for run in early], layers) % step :: step]


def _runs(targets: Sequence[RoleTensor], length: int) -> list[list[RoleTensor]]:
    """Return all spans of neighbouring layers, shorter ones if none is as long as asked for."""
    for size in range(min(length, len(targets)), 0, -1):
        runs = [list(targets[i : i + size]) for i in range(len(targets) - size + 1)]
        if found := [run for run in runs if layer_of(run[-1]) - layer_of(run[0]) == size - 1]:
            return found
    return []


def choose_span(scores: Sequence[tuple[float, float]], firsts: Sequence[int], layers: int) -> int:
    """Return the number of a span that reaches about as far as the best and disturbs text about as little.

    Several do as a rule, and what is measured hardly tells them apart: it is read at the end of prompts, and of what
    blocks before a span have taken from the name, it misses what goes into later words. So the paper's depth decides.
    On SmolLM2-135M with lambda=10, spans from layers 8, 2 and 4 left .192, .186 and .180 of the divergence, and brought
    answers down by .32, .42 and .72: the last begins at an eighth of the depth.

    Args:
        scores: Of each span the share of the divergence that is left, and what it does to ordinary text.
        firsts: First layer of each span, ascending.
        layers: Number of blocks of the model.
    """
    least = min(left for left, _ in scores)
    near = [number for number, (left, _) in enumerate(scores) if left <= least + REACH]
    calmest = min(scores[number][1] for number in near)
    equal = [number for number in near if scores[number][1] <= CALM * calmest]
    return equal[nearest_to_depth([firsts[number] for number in equal], layers)]


def search_span(
    operation: Operation, writer: Writer, spans: Sequence[Sequence[RoleTensor]]
) -> tuple[Sequence[RoleTensor], list[dict[str, object]]]:
    """Try spans on a loaded model; return the best one and what was found of each.

    Reach is the KL divergence from the new name that is left after wordings that the edit is not made from (shipped
    ones and the pairs' `prompts`), as a share of that before; what is disturbed is the KL divergence on ordinary text.

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
    probes = [probe for probe in make_probes(encoder, operation.pairs) if probe.kind != "alias"]
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
    best = choose_span(scores, [layer_of(span[0]) for span in spans], operation.structure.layers)
    listed = ", ".join(str(layer_of(target)) for target in spans[best])
    operation.progress.notice(
        f"layers {listed} are edited: {scores[best][0]:.0%} of the divergence from the target is left after other "
        f"wordings, and ordinary text moves by {scores[best][1]:.2g} nats per token"
    )
    return spans[best], tried
