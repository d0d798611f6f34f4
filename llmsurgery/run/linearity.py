"""`linearity`: how far a model's norms are from affine maps, and how wrong direct logit attribution is; read-only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import require_text_model
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.source import resolve_source
from llmsurgery.data import GENERAL_TEXT
from llmsurgery.errors import GateError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.gates import check_gates, parse_gate
from llmsurgery.run.encoding import encode_for_figures, make_encoder, require_known_tokens
from llmsurgery.run.files import read_sets
from llmsurgery.run.manifest import gate_record

if TYPE_CHECKING:
    from llmsurgery.data.records import Row
    from llmsurgery.evaluate.intervals import Figure


@dataclass(frozen=True)
class LinearityRequest:
    """What `linearity` is asked for; see `llmsurgery.api.linearity`."""

    model: str
    source: str | None
    text: str | None
    require: tuple[str, ...]
    device: str
    dtype: str
    trust_remote_code: bool


def check_linearity(request: LinearityRequest) -> dict[str, object]:
    """Measure one or two models; see `llmsurgery.api.linearity` for the result."""
    gates = [parse_gate(text, {"norms", "text"}) for text in request.require]
    rows = read_sets({"text": Path(request.text) if request.text is not None else GENERAL_TEXT})
    places = {"source": request.source, "model": request.model}
    opened = {name: Checkpoint.open(resolve_source(place)) for name, place in places.items() if place is not None}
    found = {name: _measure(checkpoint, rows["text"], request) for name, checkpoint in opened.items()}
    document: dict[str, object] = {
        "models": {
            name: {
                "path": str(opened[name].root),
                "figures": {metric: figure.value for metric, figure in figures.items()},
                "norms": figures["linearity.norm_error"].detail["norms"],
                "components": figures["linearity.attribution_error"].detail["components"],
            }
            for name, figures in found.items()
        },
        "tokens": found["model"]["linearity.attribution_error"].n,
    }
    numbers = {name: {metric: figure.number for metric, figure in figures.items()} for name, figures in found.items()}
    outcomes = check_gates(gates, numbers["model"], numbers.get("source", {}))
    document["gates"] = [gate_record(outcome) for outcome in outcomes]
    if failed := [outcome for outcome in outcomes if not outcome.passed]:
        error = GateError(
            f"gate {failed[0].gate} failed: {failed[0].value:.4g} against {failed[0].limit:.4g}",
            "the model is not linear where it is to be",
            "llmsurgery remove-layernorm makes it so",
        )
        error.report = document
        raise error
    return document


def _measure(checkpoint: Checkpoint, rows: list[Row], request: LinearityRequest) -> dict[str, Figure]:
    from llmsurgery.compute.device import memory_errors, resolve_device, resolve_dtype, suitable_threads
    from llmsurgery.compute.load import load_model
    from llmsurgery.evaluate.linearity import linearity_figures

    structure = detect(checkpoint.config, checkpoint.tensors)
    require_text_model(structure, "linearity")
    encoder = make_encoder(checkpoint)
    data = encode_for_figures(encoder, {"text": rows}, EvaluationConfig())
    require_known_tokens(data, structure)
    device = resolve_device(request.device)
    # What is looked for is as small as the rounding of fp32.
    dtype = resolve_dtype("float32" if request.dtype == "auto" else request.dtype, "F32", device)
    parameters: Any = sum(info.size for info in checkpoint.tensors.values())
    with memory_errors(), suitable_threads(parameters, device):
        model = load_model(checkpoint.root, dtype, device, request.trust_remote_code, structure.family.buffers)
        return linearity_figures(model, structure, data.texts)
