"""The options that commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsurgery.errors import UsageError

Model = Annotated[
    str | None,
    typer.Argument(
        help="checkpoint directory, .gguf file or cached hub id; none: the embedded demo", show_default=False
    ),
]
Models = Annotated[
    list[str] | None, typer.Argument(help="checkpoint directories, .gguf files or cached hub ids", show_default=False)
]
OneModel = Annotated[str, typer.Argument(help="checkpoint directory, .gguf file or cached hub id")]
Method = Annotated[str, typer.Option("--method", help="method name; `llmsurgery methods` lists them")]
Forget = Annotated[str | None, typer.Option("--forget", help="data file of what is to be forgotten")]
Retain = Annotated[str | None, typer.Option("--retain", help="data file of what is to stay")]
Holdout = Annotated[
    str | None, typer.Option("--holdout", help="data file of what the model never saw, for forget.min_k_auc")
]
RetainModel = Annotated[
    str | None, typer.Option("--retain-model", help="a model that never saw the forget rows, for forget.quality")
]
RetainLog = Annotated[
    str | None, typer.Option("--retain-log", help="published log of such a model, instead of --retain-model")
]
FromLog = Annotated[
    list[str] | None,
    typer.Option("--from-log", help="recompute the figures of a published TOFU log, without a model; may be repeated"),
]
Log = Annotated[
    str | None, typer.Option("--log", help="write the numbers per row here, as open-unlearning does; no text")
]
Authors = Annotated[
    str | None, typer.Option("--authors", help="real-author facts with wrong answers, for utility.model_utility")
]
Facts = Annotated[str | None, typer.Option("--facts", help="world facts with wrong answers, for utility.model_utility")]
Text = Annotated[str | None, typer.Option("--text", help="plain text for perplexity; default: a shipped corpus")]
Mcq = Annotated[
    str | None,
    typer.Option("--mcq", help="multiple-choice questions, asked by letter in every cyclic order, or about pictures"),
]
PositionInvariant = Annotated[
    bool,
    typer.Option(
        "--position-invariant",
        help="ask --mcq by position-invariant inference (PINE) too: how often does the order of options decide?",
    ),
]
Contrast = Annotated[
    str | None, typer.Option("--contrast", help="texts that differ in a group: CrowS-Pairs, first/second, text/label")
]
Source = Annotated[str | None, typer.Option("--source", help="the model before surgery, to compare with")]
Attacks = Annotated[
    list[str] | None,
    typer.Option(
        "--attack", metavar="NAME,...", help="try to bring the forget rows back (needs --source); may be repeated"
    ),
]
Control = Annotated[
    str | None,
    typer.Option(
        "--control", help="rows of the same form that the source does not know: a control of --attack relearn"
    ),
]
Harmful = Annotated[str | None, typer.Option("--harmful", help="file of prompts that are to be refused; never printed")]
Task = Annotated[str | None, typer.Option("--task", help="data file of the task that a model was fine-tuned for")]
Harmless = Annotated[str | None, typer.Option("--harmless", help="file of prompts that are to be answered")]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="COMMAND",
        help="adds safety.harmful_rate: split like a shell command and run without one, reads JSONL with id, prompt, "
        "answer, writes JSONL with id, harmful",
    ),
]
Suite = Annotated[
    str | None,
    typer.Option(
        "--suite", metavar="NAME", help="a published benchmark from local files: tofu, muse, wmdp, semeval25, ort"
    ),
]
SuiteDir = Annotated[
    str | None, typer.Option("--suite-dir", metavar="DIR", help="directory with the files of --suite as published")
]
Out = Annotated[str | None, typer.Option("-o", "--out", help="output directory; default: a new one in llmsurgery-out/")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="set a hyperparameter; may be repeated")
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file of hyperparameters; --set wins over it")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="seed of everything random")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:i")]
Dtype = Annotated[str, typer.Option("--dtype", help="compute dtype: auto, float32, bfloat16 or float16")]
Quantize = Annotated[
    str,
    typer.Option(
        "--quantize", help="hold the matrices of the model in training as int8 or nf4; the edit is not rounded"
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option("--batch-size", metavar="N|auto", help="rows per forward; auto: halve them when memory runs out"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="plan, and predict the peak of memory, from headers and data; write nothing")
]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require", metavar="METRIC<=VALUE", help="gate; the suffix x means times the value before; quote it"
    ),
]
Until = Annotated[
    str | None,
    typer.Option("--until", metavar="METRIC<=VALUE", help="stop training as soon as it holds; `none`: never"),
]
Guard = Annotated[
    str | None,
    typer.Option(
        "--guard", metavar="none|self|FILE", help="protect other answers in training; default self, none under a preset"
    ),
]
Link = Annotated[bool, typer.Option("--link", help="hard-link untouched files instead of copying them")]
Force = Annotated[bool, typer.Option("--force", help="replace an existing output")]
Resume = Annotated[
    bool, typer.Option("--resume", help="go on from what an interrupted run left; start if it left nothing")
]
Save = Annotated[
    str, typer.Option("--save", help="what to publish: full checkpoint, patch file, or peft adapter (LoRA runs)")
]
NoUndo = Annotated[bool, typer.Option("--no-undo", help="leave out the undo data that `llmsurgery revert` needs")]
NewOut = Annotated[str, typer.Option("-o", "--out", help="output directory")]
PatchOut = Annotated[str | None, typer.Option("-o", "--out", help="write a patch that leads from A to B")]
KeepPartial = Annotated[bool, typer.Option("--keep-partial", help="keep the checkpoint when a gate fails")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run model code that the checkpoint brings")]
Report = Annotated[bool, typer.Option("--report", help="leave report.html in the output, a page for people")]
ReportFile = Annotated[str | None, typer.Option("--report", metavar="FILE", help="write the figures as an HTML page")]
ReportExamples = Annotated[
    int, typer.Option("--report-examples", min=0, help="forget questions quoted with their answers; 0: none")
]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="upload the result to this hub repository, made private if new"),
]
Summary = Annotated[
    str | None,
    typer.Option(
        "--summary",
        metavar="FILE|none",
        help="append a Markdown summary; default: the file that $GITHUB_STEP_SUMMARY names, where it is set",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="print only the essential result")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="print tracebacks of errors")]


def split_judge(command: str | None) -> list[str]:
    """Return the arguments of --judge; no shell ever sees them.

    Raises:
        UsageError: A quotation is not closed.
    """
    import shlex

    try:
        return shlex.split(command) if command is not None else []
    except ValueError as error:
        raise UsageError("--judge cannot be split into arguments", str(error), "close every quotation") from error
