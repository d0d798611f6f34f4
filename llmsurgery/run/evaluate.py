"""`eval`: the same figures for any number of checkpoints, optionally against the model before surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, file_digest
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.data import GENERAL_TEXT
from llmsurgery.data.records import read_rows
from llmsurgery.errors import GateError, UsageError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.figures import Measurement, TextReference, measure
from llmsurgery.evaluate.gates import check_gates, parse_gate
from llmsurgery.methods.settings import as_record, resolve_config
from llmsurgery.run.manifest import figure_record, gate_record
from llmsurgery.run.prepare import encode_for_figures, make_encoder, require_known_tokens, stored_dtype

AGAINST_SOURCE = ("utility.kl", "utility.ppl_ratio")


def evaluate_models(
    models: Sequence[str],
    files: Mapping[str, Path],
    source: str | None,
    settings: Mapping[str, object],
    require: Sequence[str],
    device: str,
    dtype: str,
    batch_size: int | None,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, object]:
    """Measure checkpoints on the same data; see `llmsurgery.api.evaluate_checkpoints` for the arguments."""
    chosen = dict(settings)
    if batch_size is not None:
        chosen.setdefault("batch_size", batch_size)
    config: EvaluationConfig = resolve_config(EvaluationConfig, chosen)
    in_use = {"text": GENERAL_TEXT, **files}
    gates = [parse_gate(text, set(in_use), config.generate) for text in require]
    for gate in gates:
        if source is None and (gate.relative or gate.metric in AGAINST_SOURCE):
            raise UsageError(f"gate {gate} needs --source", "it compares with the model before", "give --source MODEL")
    rows = {name: read_rows(path) for name, path in in_use.items()}
    places = [Checkpoint.open(resolve_source(model)) for model in ([source] if source else []) + list(models)]

    reference_texts: list[tuple[int, ...]] = []

    def measure_one(checkpoint: Checkpoint, reference: TextReference | None, keep: bool) -> Measurement:
        from llmsurgery.compute.device import memory_errors, resolve_device, resolve_dtype
        from llmsurgery.compute.load import load_model

        encoder = make_encoder(checkpoint)
        data = encode_for_figures(encoder, rows, config)
        structure = detect(checkpoint.config, checkpoint.tensors)
        require_known_tokens(data, structure)
        if reference is not None and [text.ids for text in data.texts] != reference_texts:
            raise UsageError(
                f"{checkpoint.root} and the source of --source have different tokenizers",
                "distributions over different tokens cannot be compared",
                "measure it without --source",
            )
        reference_texts[:] = [text.ids for text in data.texts]
        place = resolve_device(device)
        wanted = resolve_dtype(dtype, stored_dtype(checkpoint), place)
        with memory_errors():
            model = load_model(checkpoint.root, wanted, place, trust_remote_code, structure.family.buffers)
            return measure(model, encoder, data, config, progress, reference, keep)

    before = measure_one(places[0], None, True) if source else None
    results: list[dict[str, object]] = []
    failed: list[str] = []
    for name, checkpoint in zip(models, places[1 if source else 0 :], strict=True):
        measured = measure_one(checkpoint, before.reference if before else None, False)
        figures = {key: figure for key, figure in measured.figures.items() if before or key not in AGAINST_SOURCE}
        outcomes = check_gates(
            gates,
            {key: figure.value for key, figure in figures.items()},
            {key: figure.value for key, figure in before.figures.items()} if before else {},
        )
        failed += [f"{name}: {outcome.gate} ({outcome.value:.4g})" for outcome in outcomes if not outcome.passed]
        results.append(
            {
                "path": name,
                "metrics": {key: figure_record(figure) for key, figure in figures.items()},
                "gates": [gate_record(outcome) for outcome in outcomes],
            }
        )
    document: dict[str, object] = {
        "models": results,
        "source": None
        if before is None
        else {"path": source, "metrics": {key: figure_record(figure) for key, figure in before.figures.items()}},
        "data": {
            name: {"path": str(path), "sha256": file_digest(path), "rows": len(rows[name])}
            for name, path in in_use.items()
        },
        "evaluation": as_record(config),
    }
    if failed:
        error = GateError(f"{len(failed)} gates failed, first {failed[0]}", "a measured value missed its bound", "")
        error.report = document
        raise error
    return document
