"""The only orchestrator: measure, edit, write, reload, measure again, check the gates, publish."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.checkpoint import Publication
from llmsurgery.checkpoint.target import Claim, remove
from llmsurgery.compute.progress import Progress
from llmsurgery.edits.coverage import coverage
from llmsurgery.errors import GateError, NoEffectError
from llmsurgery.evaluate.gates import GateOutcome, check_gates
from llmsurgery.run.fitting import scoring_rows, settled
from llmsurgery.run.forms import Written, check_form, form_notice, open_publication, write_form
from llmsurgery.run.headers import plan_from_headers
from llmsurgery.run.manifest import NAME, build_manifest, encode_manifest, metric_records
from llmsurgery.run.notices import Notices, warn_of_rounding, warn_of_spill
from llmsurgery.run.operate import measure_result, operate
from llmsurgery.run.operation import Operated
from llmsurgery.run.pages import REPORT, Example, WriteCard, WriteReport, leave_report, remove_reports
from llmsurgery.run.plan import plan
from llmsurgery.run.prepare import Prepared, prepare
from llmsurgery.run.request import Request
from llmsurgery.run.resume import resumable

if TYPE_CHECKING:
    from llmsurgery.compute.halving import Halving
    from llmsurgery.evaluate.figures import Measurement


@dataclass(frozen=True)
class Pages:
    """What builds the pages of a result.

    Attributes:
        card: Builds the model card.
        report: Builds the report; None if none is asked for.
    """

    card: WriteCard
    report: WriteReport | None


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Attributes:
        manifest: The manifest, or the plan of a dry run.
        out: Directory of the result, None for a dry run.
        examples: Forget questions with answers before and after.
        report: The page for people, None if none was asked for.
    """

    manifest: dict[str, object]
    out: Path | None
    examples: tuple[Example, ...] = ()
    report: Path | None = None


def execute(request: Request, progress: Progress, write_card: WriteCard, write_report: WriteReport) -> Outcome:
    """Run one operation.

    Args:
        request: What is asked for.
        progress: Told of long work and notices.
        write_card: Builds the model card of the result.
        write_report: Builds the report where the request asks for one.

    Returns:
        The manifest and where the result lies.

    Raises:
        NoEffectError: No stored byte changed.
        GateError: A gate failed; the manifest lies beside the output as `OUT.report.json`.
        SurgeryError: Anything else that stopped the run; the source and earlier outputs are untouched.
    """
    started = time.perf_counter()
    if request.dry_run and (found := plan_from_headers(request)) is not None:
        return Outcome(found, None)
    prepared = prepare(request)
    check_form(prepared)
    if request.dry_run:
        return Outcome(plan(prepared), None)
    from llmsurgery.compute.device import repeatable_kernels, suitable_threads

    parameters = sum(info.size for info in prepared.checkpoint.tensors.values())
    pages = Pages(write_card, write_report if request.report else None)
    with suitable_threads(parameters, prepared.device), repeatable_kernels(prepared.device):
        return _run(prepared, Notices(progress), pages, started)


def _run(prepared: Prepared, notices: Notices, pages: Pages, started: float) -> Outcome:
    """Operate, write, reload, measure, check the gates, publish."""
    # Not among the notices of the manifest: a run with the numbers found is the same run.
    rows = scoring_rows(prepared.evaluation, prepared.request.batch_size, notices.progress)
    with resumable(prepared, notices.progress) as (claim, store):
        operated = operate(prepared, notices, store, rows)
        if operated.changes.empty:
            raise NoEffectError("the method produced no edit", "nothing matched", "choose other roles, layers or data")
        gc.collect()
        return _publish(prepared, notices, pages, started, claim, rows, operated)


def _publish(
    prepared: Prepared,
    notices: Notices,
    pages: Pages,
    started: float,
    claim: Claim,
    rows: Halving,
    operated: Operated,
) -> Outcome:
    """Write, reload, measure, check the gates, publish."""
    request = prepared.request
    before, changes = operated.before, operated.changes
    if (notice := form_notice(prepared)) is not None:
        notices.notice(notice)
    with open_publication(prepared, changes, claim) as publication:
        if pages.report is not None:
            # One of the source's own would else be recorded as a side file, and then replaced.
            publication.remove_file(REPORT)
        with write_form(prepared, publication, changes) as written:
            for message in publication.notices:
                notices.notice(message)
            after = measure_result(prepared, written, before, notices, rows, operated.check)
        warn_of_spill(before, after, notices)
        warn_of_rounding(prepared, operated.record, before, after, notices)
        gates = check_gates(prepared.gates, _values(after), _values(before))
        manifest = build_manifest(
            settled(prepared, rows, operated.record),
            operated.record,
            written.recorded,
            coverage([(target.stored, target.label) for target in operated.targets], written.recorded.changes),
            metric_records(before, after),
            gates,
            notices.messages,
            _cost(started, publication.bytes_written, written),
        )
        examples = _examples(prepared, before, after)
        page = None if pages.report is None else pages.report(manifest, {"": examples})
        if failed := [outcome for outcome in gates if not outcome.passed]:
            publication.keep = request.keep_partial
            if publication.keep:
                remove(claim.state)
            raise _gate_error(failed, manifest, prepared.out, publication, page, examples)
        source_card = prepared.checkpoint.root / "README.md"
        card = pages.card(manifest, source_card.read_text("utf-8", "replace") if source_card.is_file() else "")
        publication.write_file("README.md", card.encode())
        publication.write_file(NAME, encode_manifest(manifest))
        if page is not None:
            publication.write_file(REPORT, page.encode())
        publication.publish()
    remove_reports(prepared.out)
    return Outcome(manifest, prepared.out, examples, None if page is None else prepared.out / REPORT)


def _values(measurement: Measurement) -> dict[str, float]:
    return {name: figure.number for name, figure in measurement.figures.items()}


def _cost(started: float, bytes_written: int, written: Written) -> dict[str, object]:
    import torch

    from llmsurgery.compute.device import peak_memory

    return {
        "seconds": round(time.perf_counter() - started, 3),
        "threads": torch.get_num_threads(),
        "bytes_written": bytes_written,
        "undo_bytes": written.recorded.undo_bytes,
        "patch_bytes": written.patch_bytes,
        **peak_memory(),
    }


def _gate_error(
    failed: list[GateOutcome],
    manifest: dict[str, object],
    out: Path,
    publication: Publication,
    page: str | None,
    examples: tuple[Example, ...],
) -> GateError:
    report = leave_report(out, manifest, page)
    first = failed[0]
    kept = f"; the checkpoint is kept in {publication.path}" if publication.keep else ""
    error = GateError(
        f"gate {first.gate} failed: {first.value:.4g} against {first.limit:.4g}"
        + (f", and {len(failed) - 1} more" if len(failed) > 1 else ""),
        f"the checkpoint was not published; the report is {report}{kept}",
        "change the strength of the operation, or the gate",
    )
    error.report, error.examples = manifest, examples
    return error


def _examples(prepared: Prepared, before: Measurement, after: Measurement) -> tuple[Example, ...]:
    """Return the first forget questions with their answers; prompts that are to be refused are shown nowhere."""
    rows = prepared.measured.rows.get("forget", [])
    secret = {row.prompt for row in prepared.rows.get("harmful", ())}
    triples = zip(rows, before.answers.get("forget", []), after.answers.get("forget", []), strict=False)
    shown = (Example(row.prompt, row.answer, *answers) for row, *answers in triples if row.prompt not in secret)
    return tuple(islice(shown, prepared.request.report_examples))
