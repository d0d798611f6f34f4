"""The part of a run that holds a model: measure the source, run the method, measure the written result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.checkpoint import Checkpoint, decode, require_finite
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.errors import DamagedError
from llmsurgery.methods.base import MethodResult, Operation
from llmsurgery.run.adapted import attached, merged_model, merged_reader
from llmsurgery.run.forms import BESIDE, Changes, Written, changes_of
from llmsurgery.run.manifest import earlier_operations
from llmsurgery.run.notices import Notices, warn_of_nf4, warn_of_overlap, warn_of_questions
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.recover import make_recovery, other_models
from llmsurgery.run.streamed import measure_streamed, open_whole, operate_streamed, result_structure
from llmsurgery.run.training import make_session, make_statistics, train_until_it_fits, watch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.compute.halving import Halving
    from llmsurgery.compute.stream import StreamedModel
    from llmsurgery.evaluate.figures import Measurement, TextReference
    from llmsurgery.evaluate.flips import Expected
    from llmsurgery.evaluate.intervals import Figure
    from llmsurgery.evaluate.recovery import Recovery
    from llmsurgery.evaluate.redirection import RedirectReference
    from llmsurgery.evaluate.scores import SetScores
    from llmsurgery.train.state import StateStore


@dataclasses.dataclass(frozen=True)
class Operated:
    """What a method made of the source: figures before, edits and files, its record, the tensors it aimed at, and how
    the result is checked."""

    before: Measurement
    changes: Changes
    record: dict[str, object]
    targets: Sequence[RoleTensor]
    check: Callable[[PreTrainedModel], None] | None = None


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
        retained = _score_retain_model(prepared, notices, rows)
        recovery = make_recovery(prepared, notices, rows)
        streamed = open_whole(prepared, prepared.checkpoint.root, prepared.structure)
        source = [streamed.model if streamed is not None else _load(prepared, prepared.checkpoint.root)]
        read = tensor_reader(prepared.checkpoint)
        if prepared.adapter is not None:
            source = [attached(source.pop(), prepared.adapter)]
            read = merged_reader(prepared.adapter, prepared.targets, read)
        before = _measure(prepared, streamed or source[0], notices, rows, keep_reference=True, retained=retained)
        before = _with_redirection(prepared, source[0], before, None, notices, rows)
        before = _with_pruning(prepared, streamed or source[0], prepared.checkpoint, before)
        before = _with_linearity(prepared, source[0], before)
        before = _with_recovery(source[0], before, recovery, notices, rows)
        before = _with_pictures(prepared, source[0], before, notices, rows)
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
            operation = Operation(
                structure=prepared.structure,
                source_config=prepared.checkpoint.config,
                read=read,
                model=model,
                encoder=prepared.encoder,
                data=prepared.rows,
                seed=request.seed,
                progress=notices,
                training=session,
                statistics=make_statistics(prepared),
                pairs=prepared.pairs,
                choices=prepared.given.choices,
                contrast=prepared.given.contrast,
                streamed=streamed,
                beside=prepared.checkpoint.root / BESIDE,
                history=earlier_operations(prepared.checkpoint.root),
                models=other_models(prepared),
                recovery=recovery,
                pictured=prepared.pictured_given,
                adapter=prepared.adapter,
            )
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


def _score_retain_model(prepared: Prepared, notices: Notices, rows: Halving) -> Mapping[str, SetScores] | None:
    from llmsurgery.run.reference import score_retain_model

    request, retained = prepared.request, prepared.retained
    if retained is None:
        return None
    options = (prepared.device, request.dtype, request.trust_remote_code)
    return rows.run(
        lambda size: score_retain_model(
            retained, prepared.rows, dataclasses.replace(prepared.evaluation, batch_size=size), *options, notices
        )
    )


def _measure(
    prepared: Prepared,
    model: PreTrainedModel | StreamedModel,
    notices: Notices,
    rows: Halving,
    reference: TextReference | None = None,
    keep_reference: bool = False,
    retained: Mapping[str, SetScores] | None = None,
) -> Measurement:
    from llmsurgery.evaluate.figures import measure

    return rows.run(
        lambda size: measure(
            model,
            prepared.encoder,
            prepared.measured,
            dataclasses.replace(prepared.evaluation, batch_size=size),
            notices,
            reference,
            keep_reference,
            retained,
        )
    )


def _with_redirection(
    prepared: Prepared,
    model: PreTrainedModel,
    measured: Measurement,
    reference: RedirectReference | None,
    notices: Notices,
    rows: Halving,
) -> Measurement:
    """Add the figures of a redirection, if that is what is done; without a reference the model is the source."""
    from llmsurgery.evaluate.flips import flip_figure
    from llmsurgery.evaluate.redirection import redirect_figures, reference_of

    if prepared.concepts:
        from llmsurgery.evaluate.concept import concept_figure

        own = {"concept.prob": concept_figure(model, prepared.concepts)}
        return dataclasses.replace(measured, figures={**own, **measured.figures})
    if not prepared.probes:
        return measured
    common = (model, prepared.structure, prepared.probes, prepared.encoder.pad_id)
    if reference is None:
        blocks = sorted({target.layer for target in prepared.targets if target.layer is not None})
        reference = dataclasses.replace(
            reference_of(*common, blocks), expected=_expected_answers(prepared, model, notices, rows)
        )
        measured = dataclasses.replace(measured, redirected=reference)
    figures = redirect_figures(*common, reference)
    figures |= flip_figure(measured.answers.get("forget", []), reference.expected)
    return dataclasses.replace(measured, figures={**figures, **measured.figures})


def _with_recovery(
    model: PreTrainedModel, measured: Measurement, recovery: Recovery | None, notices: Notices, rows: Halving
) -> Measurement:
    """Add the figures of a recovery, if that is what is done."""
    if recovery is None:
        return measured

    def figures(size: int) -> dict[str, Figure]:
        sized = dataclasses.replace(recovery, config=dataclasses.replace(recovery.config, batch_size=size))
        return sized.figures(model, notices)

    found = rows.run(figures)
    return dataclasses.replace(measured, figures={**found, **measured.figures}, recovery=recovery)


def _with_pictures(
    prepared: Prepared,
    model: PreTrainedModel,
    measured: Measurement,
    notices: Notices,
    rows: Halving,
    result: Path | None = None,
) -> Measurement:
    """Add the figures of questions about pictures, if there are any; a result may bring a logits processor."""
    data = prepared.pictured
    if data is None:
        return measured
    from llmsurgery.compute.bundle import contrast_processor
    from llmsurgery.evaluate.pictured import measure_pictured

    decoder = None if result is None else contrast_processor(model, result)
    found = rows.run(lambda size: measure_pictured(model, data, size, notices, decoder))
    return dataclasses.replace(measured, figures={**found, **measured.figures})


def _with_pruning(
    prepared: Prepared, model: PreTrainedModel | StreamedModel, checkpoint: Checkpoint, measured: Measurement
) -> Measurement:
    """Add the figures of pruning, if that is what is done."""
    if prepared.method.spec.task != "prune":
        return measured
    from llmsurgery.evaluate.pruning import with_pruning_figures

    structured = prepared.method.spec.structured
    return with_pruning_figures(measured, checkpoint, model, prepared.measured.texts, structured)


def _with_linearity(prepared: Prepared, model: PreTrainedModel, measured: Measurement) -> Measurement:
    """Add how linear the norms are, if removing them is what is done."""
    if prepared.method.spec.task != "remove-layernorm":
        return measured
    from llmsurgery.evaluate.linearity import with_linearity_figures

    return with_linearity_figures(measured, model, prepared.structure, prepared.measured.texts)


def _expected_answers(
    prepared: Prepared, source: PreTrainedModel, notices: Notices, rows: Halving
) -> Mapping[int, Expected]:
    from llmsurgery.evaluate.flips import expected_answers

    return rows.run(
        lambda size: expected_answers(
            source,
            prepared.encoder,
            prepared.measured,
            prepared.pairs,
            dataclasses.replace(prepared.evaluation, batch_size=size),
            notices,
        )
    )


def _load(prepared: Prepared, path: Path, bundle: bool = False) -> PreTrainedModel:
    from llmsurgery.compute.load import load_model

    # The code of a bundle has just been written by this program.
    trust = bundle or prepared.request.trust_remote_code
    return load_model(path, prepared.dtype, prepared.device, trust, prepared.structure.family.buffers)


def tensor_reader(checkpoint: Checkpoint) -> Callable[[str], npt.NDArray[np.floating]]:
    """Return a function that reads a stored tensor as float32 and refuses NaN and Inf."""

    def read(name: str) -> npt.NDArray[np.floating]:
        info, raw = checkpoint.info(name), checkpoint.read(name)
        require_finite(raw, info.dtype, name)
        return decode(raw, info.dtype)

    return read


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
        after = _measure(prepared, streamed or model, notices, rows, before.reference, retained=before.retained)
        after = _with_pruning(prepared, streamed or model, Checkpoint.open(path), after)
        after = _with_linearity(prepared, model, after)
        after = _with_redirection(prepared, model, after, before.redirected, notices, rows)
        after = _with_pictures(prepared, model, after, notices, rows, result.path)
        return _with_recovery(model, after, before.recovery, notices, rows)
