"""`llmsurgery compare`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output
from llmsurgery.cli.summary import Describe
from llmsurgery.cli.summary import summary as summarised

Recipes = Annotated[
    list[str] | None,
    typer.Argument(help="METHOD, METHOD:NAME=VALUE:..., or a YAML file (method, settings, guard, until, seed)"),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="the model; none: the embedded demo")]
Unseen = Annotated[
    str | None, typer.Option("--unseen", help="rows like the retain rows that no recipe is given; only measured")
]
CompareAttacks = Annotated[
    list[str] | None,
    typer.Option("--attack", metavar="NAME,...", help="try to bring the forget rows back in every result"),
]
AttackSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="a setting of the attacks, attack.NAME=VALUE; may be repeated"),
]
Keep = Annotated[bool, typer.Option("--keep", help="keep every result below OUT; else each is measured and removed")]


def compare(
    recipes: Recipes = None,
    model: ModelOption = None,
    forget: options.Forget = None,
    retain: options.Retain = None,
    text: options.Text = None,
    unseen: Unseen = None,
    attacks: CompareAttacks = None,
    control: options.Control = None,
    assignments: AttackSettings = None,
    retain_model: options.RetainModel = None,
    out: options.Out = None,
    keep: Keep = False,
    report: options.Report = False,
    summary: options.Summary = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = None,
    force: options.Force = False,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Run several recipes on one model and the same data, and show what each forgets, keeps and costs.

    Example: llmsurgery compare flat flat:guard=none npo --model MODEL --forget forget.jsonl --retain retain.jsonl
    """
    from llmsurgery import api
    from llmsurgery.methods.settings import parse_assignments

    output = Output(as_json, quiet, verbose)
    with summarised(summary, output, _describe) as tell:
        document = api.compare(
            recipes or [],
            model,
            forget=forget,
            retain=retain,
            text=text,
            unseen=unseen,
            attacks=[name.strip() for names in attacks or [] for name in names.split(",")],
            control=control,
            settings=parse_assignments(assignments or []),
            retain_model=retain_model,
            out=out,
            keep=keep,
            seed=seed,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            force=force,
            report=report,
            trust_remote_code=trust_remote_code,
            progress=output,
        )
        tell(document)
    _show(output, cast(dict[str, Any], document))
    return next((row["exit_code"] for row in cast(Any, document)["rows"] if row["exit_code"]), 0)


def _describe() -> Describe:
    from llmsurgery.report.summary import comparison_summary

    return comparison_summary


def _show(output: Output, document: dict[str, Any]) -> None:
    from llmsurgery.report.comparison import comparison_table

    output.document(document)
    output.show(comparison_table(document), f"comparison: {document['out']}")
    output.essential(document["out"])
