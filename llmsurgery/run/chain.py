"""`run`: the steps of a recipe, each an ordinary operation on the result of an earlier one, as one result."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.preflight import check_target
from llmsurgery.checkpoint.target import Claim, make_partial, partial_of, remove, take_over
from llmsurgery.compute.progress import Progress
from llmsurgery.errors import GateError, SurgeryError, UsageError
from llmsurgery.evaluate.gates import Gate
from llmsurgery.run.chain_manifest import FAILED, NOT_RUN, PASSED, Ran, build, chain_metrics, outcomes, total_cost
from llmsurgery.run.chain_result import open_whole, whole_change, write_whole
from llmsurgery.run.chain_steps import Planned, end_gates, lineage, plan_steps, step_identity
from llmsurgery.run.execute import Outcome, Pages
from llmsurgery.run.manifest import NAME, encode_manifest
from llmsurgery.run.overrides import Loaded
from llmsurgery.run.pages import REPORT, WriteCard, WriteReport, leave_report, remove_reports
from llmsurgery.run.places import check_report, report_path
from llmsurgery.run.record import CARD
from llmsurgery.run.recover import open_source
from llmsurgery.run.replay import check_data, check_source
from llmsurgery.run.request import Request

Operate = Callable[[Request], Outcome]
IDENTITY = "chain.json"


@dataclass(frozen=True)
class Manner:
    """How a recipe is run, as the command line says it.

    Attributes:
        out: Output directory; None for the recipe's, or a generated name.
        dry_run: Plan only.
        force: Replace an existing output, and what an earlier run left.
        resume: Go on from what an interrupted run left.
        keep_steps: Keep the results of all steps.
        trust_remote_code: Run model code that a checkpoint brings.
        report: Leave a page for people beside the manifest.
        report_examples: Forget questions that it quotes from each step.
    """

    out: str | None = None
    dry_run: bool = False
    force: bool = False
    resume: bool = False
    keep_steps: bool = False
    trust_remote_code: bool = False
    report: bool = False
    report_examples: int = 3


def run_recipe(
    loaded: Loaded,
    manner: Manner,
    operate: Operate,
    write_card: WriteCard,
    write_report: WriteReport,
    progress: Progress,
) -> Outcome:
    """Run a recipe; see `llmsurgery.api.run`."""
    recipe = loaded.recipe
    planned = plan_steps(recipe, manner.trust_remote_code)
    gates = end_gates(recipe, planned)
    source, _ = open_source(planned[0].method, recipe.model, planned[0].request.models)
    if loaded.recorded is not None:
        check_data(loaded.recorded, {step.name: step.digests for step in planned})
        check_source(loaded.recorded, source)
    given = manner.out if manner.out is not None else recipe.out
    if given is not None and not given.strip():
        raise UsageError("the output is empty", "-o needs the name of a directory", "")
    out = Path(given) if given is not None else _generated(loaded.label, manner.resume)
    if len(planned) == 1:
        return operate(_single(planned[0], loaded, manner, out))
    if manner.dry_run:
        return Outcome(_plan(planned, source, recipe.model, out, operate), None)
    check_target(source, out, manner.force, manner.resume)
    check_report(out, manner.force)
    work = out.with_name(out.name + ".steps")
    lock = take_over(work) if manner.resume and work.is_dir() else make_partial(work, manner.force)
    try:
        pages = Pages(write_card, write_report if manner.report else None)
        return _Chain(loaded, manner, planned, gates, source, out, work, operate, pages, progress).run()
    finally:
        os.close(lock)


def _single(step: Planned, loaded: Loaded, manner: Manner, out: Path) -> Request:
    """Return the request of a recipe of one step: it is that operation, and ends in its manifest."""
    recipe = loaded.recipe
    return dataclasses.replace(
        step.request,
        out=str(out),
        save=recipe.save,
        undo=recipe.undo,
        require=(*step.request.require, *recipe.require),
        dry_run=manner.dry_run,
        force=manner.force,
        resume=manner.resume,
        report=manner.report,
        report_examples=manner.report_examples,
    )


def _generated(label: str, resume: bool) -> Path:
    """Return a free name below `llmsurgery-out`; with `resume` the first that an interrupted run left unfinished."""
    number = 1
    while True:
        place = Path("llmsurgery-out") / (f"run-{label}" if number == 1 else f"run-{label}-{number:03d}")
        left = (partial_of(place), place.with_name(place.name + ".steps"))
        unfinished = any(path.is_dir() for path in left)
        if not place.exists() and (resume if unfinished else not report_path(place).exists()):
            return place
        number += 1


def _plan(
    planned: Sequence[Planned], source: Checkpoint, model: str | None, out: Path, operate: Operate
) -> dict[str, object]:  # fmt: skip
    """Return the plans of all steps; those of later ones are made from the headers of the recipe's model.

    `after_smaller` names the steps that make matrices smaller or fewer before: what is planned after them is a bound.
    """
    plans = []
    shrinks = {step.name: step.method.spec.structured for step in planned}
    for step in planned:
        request = dataclasses.replace(step.request, dry_run=True, out=str(out))
        if step.takes is not None:
            request = dataclasses.replace(request, model=str(source.root))
        made = operate(request).manifest
        shrunk = [name for name in _before(step, planned) if shrinks[name]]
        plans.append({"name": step.name, "needs": list(step.needs), "after_smaller": shrunk, **made})
    return {
        "dry_run": True,
        "source": {"path": model or "demo", "bytes": source.nbytes},
        "out": str(out),
        "steps": plans,
        "memory_bytes": max(int(str(plan["memory_bytes"])) for plan in plans),
    }


def _before(step: Planned, planned: Sequence[Planned]) -> list[str]:
    """Return the names of the steps whose results lead to what a step edits, in order."""
    return [] if step.takes is None else [one.name for one in lineage([*planned[: planned.index(step)], step])][:-1]


@dataclass
class _Chain:
    """One run of several steps."""

    loaded: Loaded
    manner: Manner
    planned: list[Planned]
    gates: list[Gate]
    source: Checkpoint
    out: Path
    work: Path
    operate: Operate
    pages: Pages
    progress: Progress

    def run(self) -> Outcome:
        started = time.perf_counter()
        try:
            finished = self._finished()
            ran: list[Ran] = []
            for number, step in enumerate(self.planned, 1):
                ran.append(self._step(step, number, ran, finished))
            if any(one.status != PASSED for one in ran):
                raise self._failure(ran, [], "a step did not pass")
            spent = time.perf_counter() - started
            manifest = self._publish(ran, spent)
        except GateError:
            # As after a single operation, nothing but the report stays; going on would end in the same failure.
            self._clean()
            raise
        except BaseException as error:
            if not self.work.is_dir():
                raise
            if not any(path.name != IDENTITY for path in self.work.iterdir()):
                self._clean()
            elif isinstance(error, SurgeryError):
                advice = f"finished steps are kept in {self.work}; --resume goes on from them"
                error.fix = f"{error.fix}; {advice}" if error.fix else advice
            raise
        remove_reports(self.out)
        return Outcome(manifest, self.out, report=None if self.pages.report is None else self.out / REPORT)

    def _clean(self) -> None:
        if not self.manner.keep_steps:
            remove(self.work)

    def _finished(self) -> set[str]:
        """Return the steps that an earlier run finished, and write down what this one is.

        Raises:
            UsageError: One of them was another step.
        """
        path = self.work / IDENTITY
        wanted = {step.name: step_identity(step, self.source) for step in self.planned}
        try:
            found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        except ValueError:
            # Killed while it was written, before any step.
            found = {}
        finished: set[str] = set()
        for step in self.planned:
            manifest = self.work / step.name / NAME
            if not manifest.is_file():
                continue
            different = _differences(found.get(step.name, {}), wanted[step.name])
            different += _settings_differ(json.loads(manifest.read_text("utf-8")), step)
            if different:
                raise UsageError(
                    f"the finished step {step.name} in {str(self.work)!r} differs in {', '.join(different)}",
                    "going on would mix two recipes",
                    "give the same recipe, source and options, or start anew with --force in place of --resume",
                )
            if step.takes is None or step.takes in finished:
                finished.add(step.name)
            else:
                remove(self.work / step.name)
        temporary = path.with_suffix(".tmp")
        with writing(path):
            temporary.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8")
            temporary.replace(path)
        return finished

    def _step(self, step: Planned, number: int, ran: Sequence[Ran], finished: set[str]) -> Ran:
        status = {one.step.name: one.status for one in ran}
        title, place = f"step {number} of {len(self.planned)}, {step.name}", self.work / step.name
        if unmet := [name for name in step.needs if status[name] != PASSED]:
            self.progress.notice(f"{title}: not run, because {', '.join(unmet)} did not pass")
            return Ran(step, NOT_RUN)
        if step.name in finished:
            self.progress.notice(f"{title}: finished by an earlier run")
            return Ran(step, PASSED, json.loads((place / NAME).read_text("utf-8")))
        self.progress.notice(title)
        remove(report_path(place))
        model = step.request.model if step.takes is None else str(self.work / step.takes)
        try:
            request = dataclasses.replace(step.request, report_examples=self.manner.report_examples)
            outcome = self.operate(dataclasses.replace(request, model=model, out=str(place), resume=True))
        except GateError as error:
            self.progress.notice(f"{title}: {error.what}")
            return Ran(step, FAILED, error.report or {}, error.examples)
        return Ran(step, PASSED, outcome.manifest, outcome.examples)

    def _publish(self, ran: Sequence[Ran], seconds: float) -> dict[str, object]:
        started = time.perf_counter()
        line = [step.name for step in lineage(self.planned)]
        lead = [one for one in ran if one.step.name in line]
        checked = outcomes(self.gates, chain_metrics(lead))
        if failed := [outcome for outcome in checked if not outcome.passed]:
            raise self._failure(ran, checked, f"gate {failed[0].gate} failed at the end")
        results = [Checkpoint.open(self.work / name) for name in line]
        whole = whole_change([self.source, *results], [list(one.manifest["tensors"]) for one in lead], self.progress)
        recipe, manner = self.loaded.recipe, self.manner
        claim = Claim(self.out, manner.force and not manner.resume, manner.resume)
        try:
            with open_whole(whole, self.out, recipe.link, manner.force, claim) as publication:
                if self.pages.report is not None:
                    publication.remove_file(REPORT)
                recorded = write_whole(whole, publication, recipe.undo, results)
                spent = seconds + time.perf_counter() - started
                cost = total_cost(ran, 0.0, publication.bytes_written, recorded.undo_bytes)
                cost["seconds"] = round(max(spent, float(str(cost["seconds"]))), 3)
                manifest = build(recipe.model, self.source, str(self.out), ran, line, checked, recorded, cost)
                card = self.source.root / CARD
                text = card.read_text("utf-8", "replace") if card.is_file() else ""
                publication.write_file(CARD, self.pages.card(manifest, text).encode())
                publication.write_file(NAME, encode_manifest(manifest))
                if (page := self._page(manifest, ran)) is not None:
                    publication.write_file(REPORT, page.encode())
                publication.publish(None if manner.keep_steps else self.work)
        finally:
            claim.discard()
        return manifest

    def _page(self, manifest: dict[str, object], ran: Sequence[Ran]) -> str | None:
        if self.pages.report is None:
            return None
        return self.pages.report(manifest, {one.step.name: one.examples for one in ran if one.examples})

    def _failure(self, ran: Sequence[Ran], checked: Sequence[Any], what: str) -> GateError:
        """Write the report of a recipe that failed, and return the error that says so."""
        bad = [one for one in ran if one.status == FAILED]
        passed = {one.step.name for one in ran if one.status == PASSED}
        line = [step.name for step in lineage(self.planned) if step.name in passed]
        cost = total_cost(ran, 0.0, 0, None)
        manifest = build(self.loaded.recipe.model, self.source, str(self.out), ran, line, checked, None, cost)
        report = leave_report(self.out, manifest, self._page(manifest, ran))
        if bad:
            gate = next(gate for gate in bad[0].manifest["gates"] if not gate["passed"])
            what = f"gate {gate['gate']} of step {bad[0].step.name} failed"
        error = GateError(
            what, f"nothing was published; the report is {report}", "change the strength of a step, or the gate"
        )
        error.report = manifest
        return error


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = []
    for key in wanted:
        before, after = found.get(key), wanted[key]
        if before != after and isinstance(before, dict) and isinstance(after, dict):
            names += [f"{key}.{name}" for name in {**before, **after} if before.get(name) != after.get(name)]
        elif before != after:
            names.append(key)
    return names


def _settings_differ(manifest: Mapping[str, Any], step: Planned) -> list[str]:
    """Return the settings of a finished step that are not those asked for; None is filled in during a run."""
    recorded = manifest["operations"][0]["settings"]
    wanted = json.loads(json.dumps(dict(step.resolved["settings"])))
    return [f"settings.{name}" for name, value in wanted.items() if value is not None and recorded.get(name) != value]
