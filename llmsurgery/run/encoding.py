"""The tokenizer of a checkpoint, and data as its token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmsurgery.arch.bundle import plain_config
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.data.asked import Asked
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.methods.base import Method
from llmsurgery.run.files import CONTROL, SETS
from llmsurgery.train.config import TrainingConfig

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.pairs import Pair
    from llmsurgery.evaluate.encode import EvaluationData
    from llmsurgery.evaluate.pictured import PicturedSet
    from llmsurgery.evaluate.redirection import Probe


def make_encoder(checkpoint: Checkpoint) -> Encoder:
    """Load the tokenizer of a checkpoint with the model's own bound on length."""
    from llmsurgery.compute.load import load_tokenizer
    from llmsurgery.data.chat import Encoder

    config = plain_config(checkpoint.config)
    inner = config.get("text_config")
    config = inner if isinstance(inner, Mapping) else config
    lengths = [config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx")]
    known = [length for length in lengths if isinstance(length, int) and length > 0]
    return Encoder(load_tokenizer(checkpoint.root), min(known, default=2048))


def encode_for_figures(
    encoder: Encoder,
    rows: Mapping[str, Sequence[Row]],
    evaluation: EvaluationConfig,
    config: object = None,
    asked: Asked | None = None,
) -> EvaluationData:
    """Encode the data sets that figures are measured on; plain text is cut as the method's config cuts it."""
    from llmsurgery.data.chat import CHUNK_TOKENS
    from llmsurgery.data.mcq import first_questions, read_template
    from llmsurgery.evaluate.encode import encode_data
    from llmsurgery.evaluate.letters import encode_letters
    from llmsurgery.evaluate.listings import encode_listings
    from llmsurgery.evaluate.stereotypes import encode_stereotypes

    training = getattr(config, "training", None)
    chunk = min(CHUNK_TOKENS, training.max_length) if isinstance(training, TrainingConfig) else CHUNK_TOKENS
    sets = {name: list(rows[name]) for name in (*SETS, CONTROL) if name in rows}
    data = encode_data(encoder, sets, list(rows.get("text", ())), evaluation, chunk)
    if asked is None:
        return data
    letters = listings = None
    if asked.choices is not None:
        template = read_template(evaluation.mcq_template or str(getattr(config, "template", "")))
        choices = first_questions(asked.choices, evaluation.mcq_rows)
        letters = encode_letters(encoder, choices, template)
        if evaluation.position_invariant:
            listings = encode_listings(encoder, choices, template, letters.tokens)
    pairs = encode_stereotypes(encoder, asked.contrast)
    return dataclasses.replace(data, letters=letters, listings=listings, stereotypes=pairs)


def encode_pairs(method: Method, config: object, encoder: Encoder, pairs: Sequence[Pair]) -> list[Probe]:
    """Let the method check the pairs, and return the prompts that they are measured on."""
    if not pairs or method.spec.targetless:
        return []
    from llmsurgery.evaluate.redirection import make_probes

    check = getattr(method, "check_pairs", None)
    if check is not None:
        check(config, encoder, pairs)
    return make_probes(encoder, pairs)


def encode_pictures(checkpoint: Checkpoint, encoder: Encoder, asked: Asked) -> PicturedSet | None:
    """Return questions about pictures as prompts, None without any."""
    if asked.pictured is None:
        return None
    from llmsurgery.compute.load import load_processor
    from llmsurgery.evaluate.pictured import encode_pictured

    return encode_pictured(load_processor(checkpoint.root), encoder, asked.pictured)


def require_known_tokens(data: EvaluationData, structure: Structure, others: Sequence[Encoded] = ()) -> None:
    """Refuse a tokenizer that has ids beyond the model's embedding.

    Raises:
        InputError: Names the id and the number of embeddings.
    """
    encoded = [*others, *data.texts, *data.domain, *(row for rows in data.encoded.values() for row in rows)]
    encoded += [row for sets in data.wrong.values() for rows in sets.values() for row in rows]
    encoded += [row for sets in data.paraphrased.values() for row in sets.values()]
    encoded += [row for rows in data.whole.values() for row in rows]
    encoded += data.letters.prompts if data.letters else []
    encoded += data.stereotypes.encoded if data.stereotypes else []
    require_embedded(encoded, structure)


def require_embedded(encoded: Sequence[Encoded], structure: Structure) -> None:
    """Refuse token ids beyond the model's embedding.

    Raises:
        InputError: Names the id and the number of embeddings.
    """
    embeddings = next(tensor.shape[0] for tensor in structure.tensors if tensor.role == "embed")
    highest = max((max(row.ids) for row in encoded), default=0)
    if highest >= embeddings:
        raise InputError(
            f"the tokenizer gives token id {highest}, the model has {embeddings} embeddings",
            "tokenizer and weights are not from the same model",
            "copy the right tokenizer beside the weights",
        )
