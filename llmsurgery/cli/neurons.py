"""`llmsurgery neurons`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output

Find = Annotated[
    str | None, typer.Option("--find", metavar="WORD", help="list neurons with a form of this word among their tokens")
]
Layers = Annotated[str | None, typer.Option("--layers", metavar="0,3-5", help="layers to look at; default: all")]
Side = Annotated[
    str,
    typer.Option("--side", help="in: what neurons read; gate: what opens them; out: what they write; both: in+out"),
]
Top = Annotated[int, typer.Option("--top", min=0, help="neurons that are listed; 0: all")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="first tokens that are kept of each neuron")]
FoldNorms = Annotated[bool, typer.Option("--fold-norms", help="multiply by the gains of the norms in between")]
Compare = Annotated[
    str | None,
    typer.Option("--compare", metavar="OTHER", help="share of neurons with the same first token in another checkpoint"),
]
Picture = Annotated[str | None, typer.Option("--picture", help="also draw the map: a .png, .svg or .pdf file")]


def neurons(
    model: options.OneModel,
    find: Find = None,
    layers: Layers = None,
    side: Side = "in",
    top: Top = 20,
    tokens: Tokens = 5,
    fold_norms: FoldNorms = False,
    compare: Compare = None,
    picture: Picture = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Name the neurons of the MLPs by the tokens that their weights point to in the head.

    Example: llmsurgery neurons MODEL --find dog --side both
    """
    from llmsurgery import api
    from llmsurgery.report.neurons import map_table, neuron_name, neuron_table

    output = Output(as_json, quiet, verbose)
    document = cast(
        dict[str, Any],
        api.neurons(
            model,
            find=find,
            layers=layers,
            side=side,
            top=top,
            tokens=tokens,
            fold_norms=fold_norms,
            compare=compare,
            picture=picture,
            device=device,
            progress=output,
        ),
    )
    output.document(document)
    vocabulary, compared = document["vocabulary"], document.get("compare")
    output.show(
        neuron_table(document),
        *([map_table(document)] if document["find"] and document["neurons"] else []),
        f"{vocabulary['tokens'] - vocabulary['named']} of {vocabulary['tokens']} tokens are special, no text or "
        "untrained, and left out",
        *([f"{document['agreeing']} neurons name a word on both sides"] if "agreeing" in document else []),
        *([f"same first token in {compared['path']}: {compared['share']:.1%} of {compared['neurons']:,}"]
          if compared else []),
        "z, not p, compares neurons; tokens of early layers mean little, since they do not share the head's basis",
    )  # fmt: skip
    if compared:
        output.essential(f"{compared['share']:.6f}")
    else:
        output.essential("\n".join(neuron_name(neuron) for neuron in document["neurons"]))
