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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.clamp_effects import ordinary_texts, percentiles, stored_as_clamped, sweep_values
from llmsurgery.methods.clamp_neurons import (
    given_neurons,
    neuron_places,
    neurons_of_words,
    parse_address,
    stored_vectors,
)
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.arch.neurons import NeuronVectors
    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.compute.clamping import Clamp
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.concepts import Concept
    from llmsurgery.data.pairs import Pair
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import Edit


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
        if config.neurons:
            found = given_neurons(config, places)
        else:
            found = neurons_of_words(config, operation, places, concepts)
        dense = all(clamp.reads.tensor.expert is None for clamp in found)
        if config.value and any(clamp.reads.part != "mlp" for clamp in found):
            from llmsurgery.errors import UnsupportedError

            raise UnsupportedError(
                "a neuron of an expert can only be switched off", "experts have no biases", "use value=0"
            )
        texts = ordinary_texts(operation)
        strengths = percentiles(operation, found, texts) if dense else [None] * len(found)
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
            record["sweep"] = sweep_values(operation, found, strengths, concepts, texts)
        check = stored_as_clamped(operation, held, texts) if dense and texts else None
        return MethodResult(edits, record, check=check)


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
            values[key] += clamp.value * stored_vectors(operation, place)[clamp.neuron].double().numpy()
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
