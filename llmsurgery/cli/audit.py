"""`llmsurgery audit ches` and `llmsurgery audit bci`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output

audit = typer.Typer(
    help="Score preference or fine-tuning data with a model's help, and write what passes a filter; changes no model.",
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[str, typer.Argument(help="data file of preference pairs: chosen/rejected, with or without prompt")]
Rows = Annotated[str, typer.Argument(help="data file of preference pairs, or of rows with one answer")]
Keep = Annotated[float, typer.Option("--keep", help="share of the pairs that is kept, those with the lowest scores")]
Score = Annotated[str, typer.Option("--score", help="what the filter goes by: ln_ches, or ches, which follows length")]
End = Annotated[bool, typer.Option("--end/--no-end", help="whether answers have their end token, as in training")]
Reference = Annotated[
    str | None, typer.Option("--reference", help="data file of the corpus that tokens and spans are counted in")
]
Window = Annotated[int, typer.Option("--window", help="tokens of a span")]
Tau = Annotated[float, typer.Option("--tau", help="BCI in nats above which a span is flagged")]
MostFound = Annotated[
    int, typer.Option("--most-found", help="spans that the reference holds more often do not count; 0: all do")
]
Every = Annotated[bool, typer.Option("--every-window", help="count spans that the reference does not hold as well")]
Picture = Annotated[str | None, typer.Option("--picture", help="also draw the distribution: a .png, .svg or .pdf file")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="rows per forward at most")]


@audit.command()
def ches(
    data: Data,
    model: options.OneModel,
    keep: Keep = 0.05,
    score: Score = "ln_ches",
    end: End = True,
    out: options.Out = None,
    picture: Picture = None,
    force: options.Force = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: BatchSize = 8,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Find the pairs whose two answers are alike to a model, on which preference training lowers both (2410.08847).

    Example: llmsurgery audit ches pairs.jsonl MODEL --keep 0.05 -o OUT
    """
    own = {"keep": keep, "score": score, "end": end, "device": device, "dtype": dtype, "batch_size": batch_size}
    output = Output(as_json, quiet, verbose)
    _run(output, "ches", data, model, out, picture, force, trust_remote_code=trust_remote_code, **own)


@audit.command()
def bci(
    data: Rows,
    model: options.OneModel,
    reference: Reference = None,
    window: Window = 8,
    tau: Tau = 20.0,
    most_found: MostFound = 3,
    every: Every = False,
    out: options.Out = None,
    picture: Picture = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Find answers with a span that a reference corpus holds and whose tokens are rare in it (2508.02063).

    Example: llmsurgery audit bci pairs.jsonl MODEL --reference corpus.jsonl -o OUT
    """
    own = {"reference": reference, "window": window, "tau": tau, "most_found": most_found, "every": every}
    _run(Output(as_json, quiet, verbose), "bci", data, model, out, picture, force, **own)


def _run(
    output: Output, kind: str, data: str, model: str, out: str | None, picture: str | None, force: bool, **own: Any
) -> None:
    from llmsurgery import api
    from llmsurgery.report.audit import audit_tables

    document = cast(
        dict[str, Any], api.audit(kind, data, model, out=out, picture=picture, force=force, progress=output, **own)
    )
    output.document(document)
    record = document["operations"][0]["record"]
    output.show(*audit_tables(document), *_FACTS[kind](record), f"audit: {document['out']}")
    output.essential(document["out"])


def _ches_facts(record: dict[str, Any]) -> list[str]:
    return [
        f"kept: {record['kept']} of {record['rows']} pairs, scores up to {record['highest_kept']:.6g}",
        "a low score keeps unlike answers, among them a refusal beside a compliance: look at what is kept",
    ]


def _bci_facts(record: dict[str, Any]) -> list[str]:
    counted = record["reference"]
    return [
        f"flagged: {record['flagged']} of {record['rows']} rows",
        f"without a span that counts: {record['without_candidates']}",
        f"reference: {counted['tokens']:,} tokens in {counted['passages']:,} passages",
        "BCI measures how rare tokens are, not what a span says",
    ]


_FACTS = {"ches": _ches_facts, "bci": _bci_facts}
