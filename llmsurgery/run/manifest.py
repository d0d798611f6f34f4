"""`surgery.json`: what was done, to what, with which result."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgery import __version__
from llmsurgery.checkpoint import file_digest
from llmsurgery.data.documents import parse_json
from llmsurgery.edits.coverage import RoleCoverage
from llmsurgery.edits.write import TensorChange
from llmsurgery.evaluate.gates import METRICS, GateOutcome
from llmsurgery.methods.settings import as_record
from llmsurgery.run.adapted import adapter_record
from llmsurgery.run.fitting import bitsandbytes_version
from llmsurgery.run.pairs import NEED as PAIRS
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.record import Recorded
from llmsurgery.run.recover import model_records

if TYPE_CHECKING:
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.evaluate.intervals import Figure
    from llmsurgery.evaluate.judge import Judge

FORMAT = 1
NAME = "surgery.json"


def build_manifest(
    prepared: Prepared,
    record: dict[str, object],
    recorded: Recorded,
    covered: Sequence[RoleCoverage],
    metrics: dict[str, object],
    gates: Sequence[GateOutcome],
    notices: Sequence[str],
    cost: dict[str, object],
) -> dict[str, object]:
    """Return the manifest of a run as JSON values.

    Times, memory and paths stand under `cost`, `source.path`, `out` and `data.*.path`; everything else is the same for
    two runs on the same machine, versions and threads.
    """
    import torch
    import transformers

    request = prepared.request
    config_file = prepared.checkpoint.root / "config.json"
    return {
        "format": FORMAT,
        "versions": {
            "llmsurgery": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **bitsandbytes_version(prepared),
        },
        "source": {
            "path": str(prepared.checkpoint.root) if request.model is not None else "demo",
            "given": request.model,
            "config_sha256": file_digest(config_file),
        },
        "out": str(prepared.out),
        "operations": [
            {
                "task": prepared.method.spec.task,
                "method": prepared.method.spec.name,
                "paper": prepared.method.spec.paper,
                "settings": as_record(prepared.config),
                "evaluation": as_record(prepared.evaluation),
                "seed": request.seed,
                "device": str(prepared.device),
                "dtype": str(prepared.dtype).removeprefix("torch."),
                "quantize": request.quantize,
                "batch_size": request.batch_size,
                "guard": {"source": prepared.guard, **as_record(prepared.guarding)},
                "until": None if prepared.until is None else str(prepared.until),
                "require": [str(gate) for gate in prepared.gates],
                **({"judge": judge.record()} if (judge := _judge(prepared)) else {}),
                **({"pairs": [pair.record() for pair in prepared.pairs]} if prepared.pairs else {}),
                "record": record,
            }
        ],
        "data": data_records(
            prepared.files, {**prepared.rows, PAIRS: prepared.pairs, **prepared.asked.members}, prepared.hashes
        ),
        "retain_model": prepared.retain_model,
        **({"models": model_records(prepared)} if prepared.others else {}),
        **({"adapter": adapter_record(prepared)} if prepared.adapter is not None else {}),
        "history": earlier_operations(prepared.checkpoint.root),
        "export": "adapter" if request.save == "adapter" else prepared.export,
        "save": request.save,
        "coverage": [dataclasses.asdict(row) for row in covered],
        "tensors": {change.name: change_record(change) for change in recorded.changes},
        "files": recorded.files,
        "metrics": metrics,
        "gates": [gate_record(outcome) for outcome in gates],
        "notices": list(notices),
        "cost": cost,
    }


def _judge(prepared: Prepared) -> Judge | None:
    from llmsurgery.evaluate.judge import make_judge

    return make_judge(prepared.request.judge, prepared.evaluation.judge_seconds)


def earlier_operations(source: Path) -> list[dict[str, Any]]:
    """Return the operations that made the source what it is, oldest first; empty for a model never operated on."""
    try:
        manifest = parse_json((source / NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return []
    parts = [manifest.get(key) for key in ("history", "operations")]
    # What others may have written beside a source is told as far as it is what we write.
    return [one for part in parts if isinstance(part, list) for one in part if isinstance(one, dict)]


def change_record(change: TensorChange) -> dict[str, object]:
    """Return what happened to one tensor as JSON values; where it moved, or had another shape, stands last."""
    record = dataclasses.asdict(change)
    del record["name"]
    record["shape"] = list(change.shape)
    for key in ("source", "shape_before"):
        if record[key] is None:
            del record[key]
    if change.shape_before is not None:
        record["shape_before"] = list(change.shape_before)
    return record


def metric_records(before: Measurement, after: Measurement) -> dict[str, object]:
    """Return `{name: {before, after, direction}}` for every metric that was measured, with the aligned model's."""
    aligned = {} if before.recovery is None else before.recovery.figures_of_aligned
    return {
        name: {
            **({"aligned": figure_record(aligned[name])} if name in aligned else {}),
            "before": figure_record(before.figures[name]),
            "after": figure_record(figure),
            "direction": METRICS[name].direction,
        }
        for name, figure in after.figures.items()
    }


def figure_record(figure: Figure) -> dict[str, object]:
    """Return one figure as JSON values; a value that is not finite becomes null."""
    interval = figure.interval
    record: dict[str, object] = {
        "value": finite(figure.value),
        "n": figure.n,
        "interval": list(interval) if interval and all(map(math.isfinite, interval)) else None,
    }
    return record | ({"detail": finite(dict(figure.detail))} if figure.detail else {})


def finite(value: object) -> object:
    """Return JSON values with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_records(
    files: Mapping[str, Path], rows: Mapping[str, Sequence[object]], hashes: Mapping[str, str]
) -> dict[str, object]:
    """Return path, digest and number of rows of every data set; never a row."""
    return {name: {"path": str(path), "sha256": hashes[name], "rows": len(rows[name])} for name, path in files.items()}


def gate_record(outcome: GateOutcome) -> dict[str, object]:
    """Return a gate's outcome as JSON values; a number that is not finite becomes null."""
    record: dict[str, object] = dataclasses.asdict(outcome)
    for name in ("limit", "value"):
        record[name] = record[name] if math.isfinite(getattr(outcome, name)) else None
    return record


def encode_manifest(manifest: dict[str, object]) -> bytes:
    """Return a manifest as the bytes of its file."""
    return (json.dumps(manifest, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
