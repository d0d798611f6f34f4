"""Neurons of MLPs: given by address, or found by the word that they read and write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsurgery.methods.base import Operation

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.neurons import NeuronVectors
    from llmsurgery.arch.spec import Structure
    from llmsurgery.compute.clamping import Clamp
    from llmsurgery.data.concepts import Concept
    from llmsurgery.methods.redirect.clamp import ClampConfig


def parse_address(text: str) -> tuple[int, int, int | None]:
    """Return layer, neuron and expert of `LAYER:NEURON` or `LAYER:NEURON@EXPERT`.

    Raises:
        UsageError: It is something else.
    """
    from llmsurgery.errors import UsageError

    match = re.fullmatch(r"\s*(\d+):(\d+)(?:@(\d+))?\s*", text)
    if match is None:
        raise UsageError(f"neuron {text!r} cannot be read", "LAYER:NEURON is expected", "--set neurons=27:34,3:12")
    return int(match[1]), int(match[2]), None if match[3] is None else int(match[3])


def neuron_places(
    config: ClampConfig, structure: Structure
) -> tuple[list[NeuronVectors], list[NeuronVectors]]:  # fmt: skip
    """Return where neurons read and write, one entry per MLP in the same order.

    Raises:
        UnsupportedError: `up` is asked for, and no gate stands behind it.
    """
    from llmsurgery.arch.neurons import neuron_vectors

    if config.where == "up":
        neuron_vectors(structure, "gate", config.layers or None)
    return neuron_vectors(structure, "in", config.layers or None), neuron_vectors(
        structure, "out", config.layers or None
    )


def given_neurons(config: ClampConfig, places: tuple[list[NeuronVectors], list[NeuronVectors]]) -> list[Clamp]:
    """Return the neurons that `neurons` names.

    Raises:
        UsageError: One does not exist.
    """
    from llmsurgery.compute.clamping import Clamp
    from llmsurgery.errors import UsageError

    found = []
    for text in config.neurons:
        layer, neuron, expert = parse_address(text)
        match = next(
            (
                (reads, writes)
                for reads, writes in zip(*places, strict=True)
                if (reads.tensor.layer, reads.tensor.expert) == (layer, expert) and neuron < reads.count
            ),
            None,
        )
        if match is None:
            raise UsageError(
                f"neuron {text} does not exist",
                "the layer, the expert or the number is beyond the model's",
                "`llmsurgery neurons MODEL --find WORD` lists neurons",
            )
        found.append(Clamp(*match, neuron, config.where))
    return found


def neurons_of_words(
    config: ClampConfig,
    operation: Operation,
    places: tuple[list[NeuronVectors], list[NeuronVectors]],
    concepts: Sequence[Concept],
) -> list[Clamp]:
    """Return the neurons that read and write each concept, strongest first."""
    import torch

    from llmsurgery.compute.clamping import Clamp, WordScorer
    from llmsurgery.compute.decode import Vocabulary
    from llmsurgery.compute.head import read_head
    from llmsurgery.data.vocabulary import form_tokens, token_texts

    head = read_head(operation.model).weight
    texts = token_texts(operation.encoder.tokenizer, len(head))
    ids = torch.tensor([number for number, text in enumerate(texts) if text is not None])
    vocabulary = Vocabulary.of(head[ids], ids)
    scorers = [WordScorer(vocabulary, form_tokens(texts, one.name) or [one.token]) for one in concepts]
    scored: list[list[tuple[float, int, int]]] = [[] for _ in concepts]
    with operation.progress.task("neurons", len(places[0])) as tick:
        for number, (reads, writes) in enumerate(zip(*places, strict=True)):
            sides = [stored_vectors(operation, place) for place in (reads, writes)]
            for scorer, found in zip(scorers, scored, strict=True):
                both = torch.minimum(*(scorer.scores(side) for side in sides))
                top = both.topk(min(config.count, len(both)))
                found += [
                    (z, number, neuron) for z, neuron in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ]
            tick(1)
    result = []
    for concept, found in zip(concepts, scored, strict=True):
        for z, number, neuron in sorted(found, key=lambda one: (-one[0], one[1:]))[: config.count]:
            clamp = Clamp(places[0][number], places[1][number], neuron, config.where)
            operation.progress.notice(
                f"{concept.name!r}: neuron {clamp.reads.tensor.layer}:{neuron} reads and writes it with z of {z:.2f}"
            )
            result.append(clamp)
    return list(dict.fromkeys(result))


def stored_vectors(operation: Operation, place: NeuronVectors) -> torch.Tensor:
    """Return the vectors of a place [count, width], as stored."""
    import torch

    matrix = torch.from_numpy(operation.read(place.tensor.stored))
    return (matrix if place.as_rows else matrix.T)[place.first : place.first + place.count]
