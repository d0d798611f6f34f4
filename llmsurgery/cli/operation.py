"""What the operation commands share: their options, declared once, and what is printed at the end."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.cli import options
from llmsurgery.cli.output import Output
from llmsurgery.cli.summary import Describe, summary

if TYPE_CHECKING:
    from llmsurgery.run.execute import Outcome


@dataclass(frozen=True)
class Common:
    """The options of every operation command; a field is an option, its annotation says how it is given."""

    method: options.Method
    model: options.Model = None
    forget: options.Forget = None
    retain: options.Retain = None
    holdout: options.Holdout = None
    retain_model: options.RetainModel = None
    authors: options.Authors = None
    facts: options.Facts = None
    text: options.Text = None
    out: options.Out = None
    assignments: options.Assignments = None
    config: options.ConfigFile = None
    seed: options.Seed = 0
    device: options.Device = "auto"
    dtype: options.Dtype = "auto"
    quantize: options.Quantize = "none"
    batch_size: options.BatchSize = None
    dry_run: options.DryRun = False
    require: options.Require = None
    until: options.Until = None
    guard: options.Guard = None
    link: options.Link = False
    force: options.Force = False
    resume: options.Resume = False
    save: options.Save = "full"
    no_undo: options.NoUndo = False
    keep_partial: options.KeepPartial = False
    trust_remote_code: options.RemoteCode = False
    report: options.Report = False
    report_examples: options.ReportExamples = 3
    push: options.Push = None
    summary: options.Summary = None
    as_json: options.Json = False
    quiet: options.Quiet = False
    verbose: options.Verbose = False

    def run(self, task: Callable[..., Outcome], chosen: Mapping[str, object] | None = None, /, **own: object) -> None:
        """Run the function of a task in `llmsurgery.api` and print its outcome.

        Args:
            task: The function.
            chosen: Hyperparameters that have an option of their own; they win over `--set`.
            **own: The arguments that only this task has.
        """
        from llmsurgery.methods.settings import parse_assignments, read_config_file

        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        output = Output(*(given.pop(name) for name in ("as_json", "quiet", "verbose")))
        config, assignments = given.pop("config"), given.pop("assignments")
        settings = {
            **(read_config_file(config) if config else {}),
            **parse_assignments(assignments or []),
            **(chosen or {}),
        }
        undo, require, model = not given.pop("no_undo"), given.pop("require") or [], given.pop("model")
        with summary(given.pop("summary"), output, describe_run) as tell:
            outcome = task(model, **given, **own, settings=settings, undo=undo, require=require, progress=output)
            if outcome.out is not None:
                tell(outcome.manifest)
        show_outcome(output, outcome)


def describe_run() -> Describe:
    """Return what makes the summary of an operation or recipe."""
    from llmsurgery.report.summary import run_summary

    return run_summary


def operation(command: Callable[..., None], method: str | None = None) -> Callable[..., None]:
    """Decorate a command whose first parameter is `Common`: it takes the common options beside its own.

    The command line is made from a function's signature, so the decorated function has one with all of them.

    Args:
        command: The command.
        method: Its method where none is given; None for a command that has to be told.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = list(inspect.signature(Common, eval_str=True).parameters.values())
    # What a task is about stands before the rest in its help; the method and the model come first.
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared[:2], *own, *shared[2:])]
    if method is not None:
        parameters[0] = parameters[0].replace(default=method)

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        extra = {parameter.name: given.pop(parameter.name) for parameter in own}
        command(Common(**given), **extra)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def show_outcome(output: Output, outcome: Outcome) -> None:
    """Print the outcome of an operation or recipe: tables for people, the manifest as JSON, or the path alone."""
    from llmsurgery.report.controls import controls_of
    from llmsurgery.report.directions import gap_table
    from llmsurgery.report.linearity import losses_of, losses_title
    from llmsurgery.report.table import coverage_table, metrics_table, rows_table

    manifest = cast(dict[str, Any], outcome.manifest)
    output.document(manifest)
    if outcome.out is None:
        _show_plan(output, manifest)
        return
    output.show(metrics_table(manifest["metrics"]), coverage_table(manifest["coverage"]))
    if outcome.examples:
        rows = [(example.question, example.before, example.after) for example in outcome.examples]
        where = "on screen only" if outcome.report is None else "on screen and in the report"
        output.show(rows_table(("question", "answer before", "answer after"), rows, f"examples ({where})"))
    if (gap := gap_table(manifest)) is not None:
        output.show(gap)
    if controls := controls_of(manifest):
        output.show(rows_table(*controls))
    if losses := losses_of(manifest):
        output.show(rows_table(("model", "loss"), losses, losses_title(manifest)))
    for gate in manifest["gates"]:
        place = f" of step {gate['step']}" if gate.get("step") else ""
        output.show(f"gate {gate['gate']}{place}: {'held' if gate['passed'] else 'failed'} ({gate['value']:.4g})")
    cost = manifest["cost"]
    output.show(
        f"{cost['seconds']:.1f} s, peak memory {cost['rss_bytes'] / 2**20:,.0f} MiB, "
        f"{cost['bytes_written'] / 2**20:,.1f} MiB written",
        *_kept(cost, str(outcome.out)),
        f"{_FORMS.get(manifest['save'], 'checkpoint')}: {outcome.out}",
        *([f"report: {outcome.report}"] if outcome.report is not None else []),
    )
    output.essential(str(outcome.out))


_FORMS = {"full": "checkpoint", "patch": "patch", "adapter": "adapter"}


def _kept(cost: dict[str, Any], out: str) -> list[str]:
    """Say how large the patch or the undo data are, and what they are for."""
    lines = []
    if cost.get("patch_bytes") is not None:
        lines.append(f"patch: {cost['patch_bytes']:,} bytes; `llmsurgery apply {out} BASE -o OUT` makes the checkpoint")
    if cost.get("undo_bytes") is not None:
        lines.append(
            f"undo data: {cost['undo_bytes']:,} bytes; `llmsurgery revert {out} -o BASE` gives the source back"
        )
    return lines


def _memory(plan: dict[str, Any]) -> str:
    """Say how much memory the run will need, and when."""
    memory = plan["memory"]
    phases = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory["phases"].items())
    place = "the process" if memory["of"] == "resident set" else "the device"
    step = memory["step"]
    traced = f"a step of {step['sequences']} sequences of {step['tokens']} tokens" if step else "the method's own not"
    return f"memory: {plan['memory_bytes'] / 2**20:,.0f} MiB of {place} at the peak, predicted ({phases}; {traced})"


def _show_plan(output: Output, plan: dict[str, Any]) -> None:
    from llmsurgery.report.table import rows_table

    rows = [(role, row["tensors"], row["parameters"], row["bytes"]) for role, row in plan["targets"].items()]
    title = f"would change: one of {plan['experts']} experts" if "experts" in plan else "would change"
    output.show(
        rows_table(("role", "tensors", "parameters", "bytes"), rows, title),
        f"{plan['tensors']} tensors, {plan['bytes_to_rewrite']:,} bytes to rewrite of {plan['source']['bytes']:,}",
        _memory(plan),
        f"output: {plan['out']} (dry run: nothing was written)",
    )
    output.essential(plan["out"])
