"""The part of a run that holds a model: measure the source, run the method, measure the written result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.errors import DamagedError
from llmsurgery.methods.base import MethodResult
from llmsurgery.run.adapted import attached, merged_model, merged_reader
from llmsurgery.run.forms import Written, changes_of
from llmsurgery.run.meter import Meter
from llmsurgery.run.notices import Notices, warn_of_nf4, warn_of_overlap, warn_of_questions
from llmsurgery.run.operation import Operated, make_operation
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.recover import make_recovery
from llmsurgery.run.source import tensor_reader
from llmsurgery.run.streamed import measure_streamed, open_whole, operate_streamed, result_structure
from llmsurgery.run.training import make_session, train_until_it_fits, watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.compute.halving import Halving
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.train.state import StateStore


def operate(prepared: Prepared, notices: Notices, store: StateStore, rows: Halving) -> Operated:
    """Load the source, measure it, run the method; the model is dropped on return."""
    from llmsurgery.compute.device import lean_allocator, memory_errors, set_seeds

    request = prepared.request
    if prepared.evaluation.figures == "edit":
        return operate_streamed(prepared, notices)
    if prepared.method.spec.trains(prepared.config):
        lean_allocator(sum(info.size for info in prepared.checkpoint.tensors.values()), prepared.device)
    for name, count in prepared.measured.skipped.items():
        notices.notice(f"{count} passages of --{name} have fewer than four tokens and are left out")
    warn_of_nf4(prepared, notices)
    warn_of_overlap(prepared, notices)
    warn_of_questions(prepared, notices)
    set_seeds(request.seed)
    with memory_errors():
        meter = Meter(prepared, notices, rows)
        retained = meter.score_retain_model()
        recovery = make_recovery(prepared, notices, rows)
        streamed = open_whole(prepared, prepared.checkpoint.root, prepared.structure)
        source = [streamed.model if streamed is not None else _load(prepared, prepared.checkpoint.root)]
        read = tensor_reader(prepared.checkpoint)
        if prepared.adapter is not None:
            source = [attached(source.pop(), prepared.adapter)]
            read = merged_reader(prepared.adapter, prepared.targets, read)
        before = meter.measure_source(source[0], streamed, retained, recovery)
        if prepared.adapter is not None:
            source.clear()
            source.append(merged_model(_load(prepared, prepared.checkpoint.root), prepared.targets, read))
        set_seeds(request.seed)
        watched = watch(prepared, source[0], before, notices, rows)
        if request.quantize != "none":
            source.clear()

        def run(model: PreTrainedModel, micro_batch: int | None) -> MethodResult:
            session = make_session(prepared, model, watched, notices, store, rows)
            session.micro_batch = micro_batch or session.micro_batch
            operation = make_operation(prepared, notices, read, model, streamed, session, recovery)
            return prepared.method.edit(prepared.config, operation, prepared.data)

        result = train_until_it_fits(prepared, source, run, store, notices.progress)
    record = dict(result.record)
    if prepared.until is not None and record.get("stopped") != "until":
        notices.notice(f"--until {prepared.until} was not reached within {record.get('steps')} steps")
    targets = prepared.targets if result.targets is None else result.targets
    if before.redirected is not None:
        layers = [target.layer for target in targets if target.layer is not None]
        before = dataclasses.replace(before, redirected=before.redirected.at(max(layers)))
    return Operated(before, changes_of(prepared.checkpoint, result), record, targets, result.check)


def _load(prepared: Prepared, path: Path, bundle: bool = False) -> PreTrainedModel:
    from llmsurgery.compute.load import load_model

    # The code of a bundle has just been written by this program.
    trust = bundle or prepared.request.trust_remote_code
    return load_model(path, prepared.dtype, prepared.device, trust, prepared.structure.family.buffers)


def _check_layout(written: Checkpoint, layout: Layout) -> None:
    expected = {name: (info.dtype, info.shape) for name, info in layout.tensors.items()}
    if {name: (info.dtype, info.shape) for name, info in written.tensors.items()} != expected:
        raise DamagedError(
            f"the checkpoint in {str(written.root)!r} has other tensors than were written into it",
            "another program changed it",
            "run again when nothing else writes there",
        )


def measure_result(
    prepared: Prepared,
    result: Written,
    before: Measurement,
    notices: Notices,
    rows: Halving,
    check: Callable[[PreTrainedModel], None] | None = None,
) -> Measurement:
    """Reload what was written with stock transformers and peft and measure that, not the live training object.

    Args:
        prepared: The checked request.
        result: What was written.
        before: Figures of the source, which the result is compared with.
        notices: Told of long work and notices.
        rows: Rows per forward.
        check: The method's own check of the loaded result.
    """
    from llmsurgery.compute.device import memory_errors

    path = prepared.checkpoint.root if result.export in ("adapter", "processor") else result.path
    if path == result.path:
        _check_layout(Checkpoint.open(path), result.layout)
    if prepared.evaluation.figures == "edit":
        return measure_streamed(prepared, result, before)
    with memory_errors():
        streamed = open_whole(prepared, path, result_structure(prepared, result))
        model = streamed.model if streamed is not None else _load(prepared, path, result.export == "bundle")
        if streamed is None and path == result.path and result.added:
            from llmsurgery.compute.load import require_taken

            buffers = prepared.structure.family.buffers
            require_taken(model, path, result.added, tensor_reader(Checkpoint.open(path)), buffers)
        if result.export == "adapter":
            from llmsurgery.train.adapter import attach_adapter

            model = attach_adapter(model, result.path)
        elif result.export == "processor":
            from llmsurgery.compute.bundle import model_with_processor

            model = model_with_processor(model, result.path)
        if check is not None and streamed is None:
            check(model)
        return Meter(prepared, notices, rows).measure_result(
            model, streamed, Checkpoint.open(path), result.path, before
        )
