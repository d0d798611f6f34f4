"""Clamp: hold neurons of the MLPs at a constant, so that what they stand for is always or never said.

Papers: "Decoding specialised feature neurons in LLMs with the final projection layer" and "Flash Interpretability",
arXiv 2501.02688. No training. Which of two readings of "clamp neuron i to c" is the papers' is not known:

    where=post  h_i := c, the activation that `down` reads
    where=up    u_i := c, the product of `up`, which is still multiplied by act(gate_i)

c = value * q, q the 99.9th percentile of |h_i| (or |u_i|) on the text of `--text`; absolute=true: c = value. The
default, value=0 with where=post, switches the neurons off, which every architecture can store: a column of zeros.

Neurons are given (neurons=27:34,3:12) or found by the word: those whose row of `up` and column of `down` both point to
one of its forms in the head, by the smaller of both z (see `llmsurgery neurons`). A word that is no token of its own is
looked for by its first token.

How it is stored, exact but for one rounding:

    value=0             zeros in a column of `down`, or in a row of `up`
    biases in the MLP   (GPT-2, GPT-NeoX) that column of zeros, and b_down += c times its old values
    Llama               the same, or b_up[i] = c with a row of zeros; mlp_bias=true, and zero biases everywhere else
    Mistral, Qwen2      as_llama=true stores them as a Llama model, which they are but for the name
    others              refused

The result is loaded again and compared with the clamped model. A clamp is on at every position of every prompt; the
sweep says what other values would do: probability of the concept and KL divergence on the text, at 1, 2, 5 and 10 q.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmsurgery.arch.neurons import NeuronVectors
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.clamping import Clamp
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.concepts import Concept
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit

SWEEP = (1.0, 2.0, 5.0, 10.0)
QUANTILE = 0.999
TEXTS, TEXT_TOKENS = 8, 64
"""Ordinary text that neurons are measured on."""

ALIKE = 0.02
"""Share of the clamp's own effect that the stored result may differ from the clamped model."""


@dataclass(frozen=True)
class ClampConfig:
    """Hyperparameters of clamp; `llmsurgery methods clamp` prints them with their help."""

    neurons: tuple[str, ...] = option((), "LAYER:NEURON (of an expert LAYER:NEURON@EXPERT); empty: found by the word")
    count: int = option(1, "neurons to take where they are found by the word", minimum=1)
    where: str = option("post", "post: the activation; up: the product of `up`, still gated", ("post", "up"))
    value: float = option(0.0, "the constant, in 99.9th percentiles of the neuron's absolute value on text")
    absolute: bool = option(False, "take `value` as it is")
    layers: tuple[int, ...] = option((), "layers that neurons are looked for in; empty: all")
    prompt: str = option("", "text that the concept follows, where the pair has no `prompts`")
    sweep: bool = option(True, "measure what other values would do")
    as_llama: bool = option(False, "store a Mistral or Qwen2 model as Llama, whose MLPs can have biases")


@register
class ClampNeurons:
    """Clamping as a method of the toolkit."""

    spec = MethodSpec(
        name="clamp",
        task="redirect",
        summary="hold the neurons that stand for a concept at a constant, or switch them off, without training",
        paper="Flash Interpretability: Decoding Specialised Feature Neurons in LLMs with the LM-Head, arXiv 2501.02688",
        needs=("pairs",),
        export="plain",
        trained=False,
        selects=True,
        targetless=True,
    )
    config_type = ClampConfig

    def plan(self, config: ClampConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may lose a row or a column.

        Raises:
            UnsupportedError: `up` is asked for, and no gate stands behind it.
        """
        return [place.tensor for place in neuron_places(config, structure)[1 if config.where == "post" else 0]]

    def prepare(self, config: ClampConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """Check the neurons' addresses.

        Raises:
            UsageError: One cannot be read.
        """
        for text in config.neurons:
            parse_address(text)

    def concepts(self, config: ClampConfig, encoder: Encoder, pairs: Sequence[Pair]) -> list[Concept]:
        """Return what the neurons stand for, with the prompts that it is measured on."""
        from llmsurgery.data.concepts import make_concept

        return [make_concept(encoder, pair, (config.prompt,) if config.prompt else ()) for pair in pairs]

    def edit(self, config: ClampConfig, operation: Operation, prepared: None) -> MethodResult:
        """Find the neurons, look what values do, and store one."""
        concepts = self.concepts(config, operation.encoder, operation.pairs)
        places = neuron_places(config, operation.structure)
        found = _given(config, places) if config.neurons else _search(config, operation, places, concepts)
        dense = all(clamp.reads.tensor.expert is None for clamp in found)
        if config.value and any(clamp.reads.part != "mlp" for clamp in found):
            from llmsurgery.errors import UnsupportedError

            raise UnsupportedError(
                "a neuron of an expert can only be switched off", "experts have no biases", "use value=0"
            )
        texts = _texts(operation)
        strengths = _strengths(operation, found, texts) if dense else [None] * len(found)
        held = [
            clamp.at(config.value if config.absolute else config.value * (strength or 0.0))
            for clamp, strength in zip(found, strengths, strict=True)
        ]
        edits = _edits(config, operation, held)
        record: dict[str, object] = {
            "neurons": [_record(clamp, q) for clamp, q in zip(held, strengths, strict=True)],
            "where": config.where,
        }
        if config.sweep and dense and texts:
            record["sweep"] = _sweep(operation, found, strengths, concepts, texts)
        check = _check(operation, held, texts) if dense and texts else None
        return MethodResult(edits, record, check=check)


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


def _given(config: ClampConfig, places: tuple[list[NeuronVectors], list[NeuronVectors]]) -> list[Clamp]:
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


def _search(
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
            sides = [_vectors(operation, place) for place in (reads, writes)]
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


def _vectors(operation: Operation, place: NeuronVectors) -> torch.Tensor:
    """Return the vectors of a place [count, width], as stored."""
    import torch

    matrix = torch.from_numpy(operation.read(place.tensor.stored))
    return (matrix if place.as_rows else matrix.T)[place.first : place.first + place.count]


def _texts(operation: Operation) -> list[tuple[int, ...]]:
    rows = list(operation.data.get("text", ()))[:TEXTS]
    return [operation.encoder.encode_text(row.answer, TEXT_TOKENS).ids for row in rows]


def _strengths(operation: Operation, found: Sequence[Clamp], texts: Sequence[tuple[int, ...]]) -> list[float]:
    from llmsurgery.compute.clamping import neuron_percentiles
    from llmsurgery.errors import InputError

    if not texts:
        raise InputError("there is no text", "neurons are measured on it", "give --text")
    return neuron_percentiles(operation.model, found, texts, QUANTILE)


def _record(clamp: Clamp, strength: float | None) -> dict[str, object]:
    tensor = clamp.reads.tensor
    return {
        "layer": tensor.layer,
        "neuron": clamp.neuron,
        "part": clamp.reads.part,
        "expert": tensor.expert,
        "value": clamp.value,
        "percentile": strength,
    }


def _log_probabilities(model: PreTrainedModel, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Return the log-probabilities of all tokens at every position of some texts [positions, vocabulary]."""
    import torch

    with torch.inference_mode():
        found = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float() for ids in texts]
        return torch.cat(found).log_softmax(-1)


def _divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before.exp() * (before - after)).sum(-1).mean())


def _sweep(
    operation: Operation,
    found: Sequence[Clamp],
    strengths: Sequence[float | None],
    concepts: Sequence[Concept],
    texts: Sequence[tuple[int, ...]],
) -> list[dict[str, float]]:
    """Return probability of the concepts and KL divergence on text for values of both signs, and for 0."""
    from llmsurgery.compute.clamping import clamped
    from llmsurgery.evaluate.concept import concept_figure

    model, notice = operation.model, operation.progress.notice
    before = _log_probabilities(model, texts[:2])
    rows = [{"value": 0.0}, *({"value": sign * factor} for factor in SWEEP for sign in (1.0, -1.0))]
    with operation.progress.task("sweep", len(rows)) as tick:
        for row in rows:
            held = [clamp.at(row["value"] * (q or 0.0)) for clamp, q in zip(found, strengths, strict=True)]
            with clamped(model, held):
                row["concept.prob"] = concept_figure(model, concepts).number
                row["kl"] = _divergence(before, _log_probabilities(model, texts[:2]))
            tick(1)
    rows.sort(key=lambda row: row["value"])
    told = "; ".join(f"{row['value']:+g}: {row['concept.prob']:.4f}, {row['kl']:.4f}" for row in rows)
    notice(f"value, in percentiles: probability of the concept, KL on text: {told}")
    return rows


def _edits(config: ClampConfig, operation: Operation, held: Sequence[Clamp]) -> list[Edit]:
    """Return the edits that store the clamps."""
    import numpy as np

    from llmsurgery.edits.kinds import Sparse
    from llmsurgery.methods.mlp_biases import bias_edits, require_biases

    structure = operation.structure
    biases = {(t.role, t.layer): t for t in structure.tensors if t.part == "bias"}
    values: dict[tuple[str, int], Any] = {}
    emptied: dict[str, list[tuple[NeuronVectors, int]]] = {}
    for clamp in held:
        place = clamp.writes if clamp.where == "post" else clamp.reads
        tensor = place.tensor
        emptied.setdefault(tensor.stored, []).append((place, clamp.neuron))
        assert tensor.layer is not None
        key = tensor.role, tensor.layer
        if not clamp.value and (clamp.where == "post" or key not in biases):
            continue
        if key not in biases:
            require_biases(structure, operation.model, config.as_llama)
        if key not in values:
            size = place.count if clamp.where == "up" else len(operation.read(structure_norm(structure)))
            values[key] = operation.read(biases[key].stored).astype(np.float64) if key in biases else np.zeros(size)
        if clamp.where == "up":
            values[key][clamp.neuron] = clamp.value
        else:
            values[key] += clamp.value * _vectors(operation, place)[clamp.neuron].double().numpy()
    edits: list[Edit] = []
    for name, vectors in emptied.items():
        tensor = vectors[0][0].tensor
        flat = np.arange(tensor.parameters, dtype=np.int64).reshape(tensor.shape)
        indices = [
            (flat if place.as_rows else flat.T)[place.first + neuron] for place, neuron in dict.fromkeys(vectors)
        ]
        where = np.sort(np.concatenate(indices))
        edits.append(Sparse(name, where, np.zeros(len(where), dtype=np.float32)))
    return edits + (bias_edits(structure, operation.model, values) if values else [])


def structure_norm(structure: Structure) -> str:
    """Return the stored name of the final norm, whose length is the width of the residual stream."""
    return structure.select(("norm.final",))[0].stored


def _check(
    operation: Operation, held: Sequence[Clamp], texts: Sequence[tuple[int, ...]]
) -> Callable[[PreTrainedModel], None]:
    """Return the comparison of the stored result, loaded again, with the clamped model."""
    from llmsurgery.compute.clamping import clamped

    before = _log_probabilities(operation.model, texts[:2])
    with clamped(operation.model, held):
        wanted = _log_probabilities(operation.model, texts[:2])
    effect = _divergence(before, wanted)

    def check(result: PreTrainedModel) -> None:
        from llmsurgery.errors import DamagedError

        left = _divergence(wanted, _log_probabilities(result, texts[:2]))
        # Rounding to the stored dtype is all that may differ.
        if left > max(1e-3, ALIKE * effect):
            raise DamagedError(
                f"the stored result is not the clamped model: KL {left:.4g} where the clamp itself makes {effect:.4g}",
                "a bias was dropped when it was loaded, or the stored dtype is too narrow for this value",
                "take a smaller value, or report this with the name of the model",
            )

    return check
