"""`llmsurgery run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output
from llmsurgery.cli.summary import summary as summarised

if TYPE_CHECKING:
    from llmsurgery.run.execute import Outcome

RecipeFile = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="YAML or JSON file, a built-in recipe's name, or surgery.json to replay"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="override by dotted path: model=DIR, steps.NAME.settings.lr=1e-4", show_default=False
    ),
]
KeepSteps = Annotated[bool, typer.Option("--keep-steps", help="keep the results of all steps in OUT.steps")]


def run_recipe(
    recipe: RecipeFile,
    assignments: Overrides = None,
    out: options.Out = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    resume: options.Resume = False,
    keep_steps: KeepSteps = False,
    trust_remote_code: options.RemoteCode = False,
    report: options.Report = False,
    report_examples: options.ReportExamples = 3,
    push: options.Push = None,
    summary: options.Summary = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a recipe: several operations in order, with gates; or repeat the run that a manifest records.

    Example: llmsurgery run nightly.yaml model=MODEL data.forget=forget.jsonl -o OUT
    """
    from llmsurgery import api
    from llmsurgery.cli.operation import describe_run, show_outcome

    output = Output(as_json, quiet, verbose)
    with summarised(summary, output, describe_run) as tell:
        outcome = api.run_recipe(
            recipe,
            assignments or (),
            out=out,
            dry_run=dry_run,
            force=force,
            resume=resume,
            keep_steps=keep_steps,
            trust_remote_code=trust_remote_code,
            report=report,
            report_examples=report_examples,
            push=push,
            progress=output,
        )
        if outcome.out is not None:
            tell(outcome.manifest)
    if "steps" in outcome.manifest and outcome.out is None:
        _show_plan(output, outcome)
        return
    if "steps" in outcome.manifest:
        for step in cast(Any, outcome.manifest["steps"]):
            output.show(f"step {step['name']}: {step['task']} --method {step['method']}, {step['status']}")
    show_outcome(output, outcome)


def _show_plan(output: Output, outcome: Outcome) -> None:
    from llmsurgery.report.table import rows_table

    plan = cast(dict[str, Any], outcome.manifest)
    output.document(plan)
    rows = [
        (
            step["name"],
            f"{step['operations'][0]['task']} --method {step['operations'][0]['method']}",
            step["tensors"],
            step["bytes_to_rewrite"],
            f"{step['memory_bytes'] / 2**20:,.0f} MiB",
        )
        for step in plan["steps"]
    ]
    smaller = sorted({name for step in plan["steps"] for name in step["after_smaller"]})
    bound = f"; after {', '.join(smaller)}, which makes it smaller, the figures are upper bounds" if smaller else ""
    output.show(
        rows_table(("step", "operation", "tensors", "bytes to rewrite", "memory"), rows, "would run"),
        f"output: {plan['out']} (dry run: nothing was written; later steps are planned from the first model{bound})",
    )
    output.essential(plan["out"])
