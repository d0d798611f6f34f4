"""Runs that read a model block by block.

`eval.figures=edit` measures only what the edited blocks show. Nothing behind the last edited block is read, before or
after. What is measured is what the edit did at the ends of the names, not what the whole model answers.

`eval.figures=streamed` measures everything, and prunes, with one block in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.run.forms import Written, changes_of
from llmsurgery.run.notices import Notices
from llmsurgery.run.operation import Operated, make_operation
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.source import tensor_reader

if TYPE_CHECKING:
    from llmsurgery.arch.spec import Structure
    from llmsurgery.compute.stream import StreamedModel
    from llmsurgery.evaluate.figures import Measurement

NOTICE = (
    "only what the edited blocks show was measured (eval.figures=edit): whether answers changed, and which others did, "
    "says `llmsurgery eval`, or a run with eval.figures=all"
)


def open_streamed(prepared: Prepared, path: Path, structure: Structure) -> StreamedModel:
    """Open the source or a written result."""
    from llmsurgery.compute.stream import StreamedModel

    trust = prepared.request.trust_remote_code
    return StreamedModel.open(path, structure, prepared.dtype, prepared.device, trust)


def open_whole(prepared: Prepared, path: Path, structure: Structure) -> StreamedModel | None:
    """Open a model all of whose figures are measured block by block (`eval.figures=streamed`); else None."""
    return open_streamed(prepared, path, structure) if prepared.evaluation.figures == "streamed" else None


def result_structure(prepared: Prepared, result: Written) -> Structure:
    """Return the roles of a written result that is streamed; of another one those of its source."""
    if prepared.evaluation.figures != "streamed" or not result.layout.files:
        return prepared.structure
    return _checked_structure(prepared, result)


def operate_streamed(prepared: Prepared, notices: Notices) -> Operated:
    """Run the method on the streamed source, then measure the source at what turned out to be the last block."""
    from llmsurgery.compute.device import memory_errors, set_seeds
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.evaluate.redirection import redirect_figures, reference_of
    from llmsurgery.train.session import Session

    set_seeds(prepared.request.seed)
    with memory_errors():
        streamed = open_streamed(prepared, prepared.checkpoint.root, prepared.structure)
        session = Session(prepared.request.seed, progress=notices)
        read = tensor_reader(prepared.checkpoint)
        operation = make_operation(prepared, notices, read, streamed.model, streamed, session)
        result = prepared.method.edit(prepared.config, operation, prepared.data)
        targets = prepared.targets if result.targets is None else result.targets
        last = max(target.layer for target in targets if target.layer is not None)
        common = (streamed, prepared.structure, prepared.probes, prepared.encoder.pad_id)
        reference = reference_of(*common, (last,), whole=False)
        figures = redirect_figures(*common, reference)
    notices.notice(NOTICE)
    before = Measurement(figures, redirected=reference.at(last))
    return Operated(before, changes_of(prepared.checkpoint, result), dict(result.record), targets)


def measure_streamed(prepared: Prepared, result: Written, before: Measurement) -> Measurement:
    """Measure a written result as the source was."""
    from llmsurgery.compute.device import memory_errors
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.evaluate.redirection import redirect_figures

    assert before.redirected is not None
    structure = prepared.structure
    if result.layout.files:
        structure = _checked_structure(prepared, result)
    with memory_errors():
        streamed = open_streamed(prepared, result.path, structure)
        common = (streamed, structure, prepared.probes, prepared.encoder.pad_id)
        return Measurement(redirect_figures(*common, before.redirected))


def _checked_structure(prepared: Prepared, result: Written) -> Structure:
    """Return the structure of a result with other tensors than its source, all of which stock transformers takes."""
    from llmsurgery.compute.load import empty_model, require_taken

    written, buffers = Checkpoint.open(result.path), prepared.structure.family.buffers
    model = empty_model(result.path, prepared.dtype, prepared.request.trust_remote_code, buffers)
    require_taken(model, result.path, result.added, tensor_reader(written), buffers)
    return detect(written.config, written.tensors)
