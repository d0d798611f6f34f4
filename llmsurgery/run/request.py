"""What a caller asks for. No heavy import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One operation on one model, as the command line or the Python API gives it.

    Attributes:
        task: Task ("unlearn").
        method: Method name.
        model: Directory, `.gguf` file or hub id; None for the embedded demo.
        data: Data name ("forget", "retain", "holdout", "authors", "facts", "text", "pairs", "harmful", "task",
            "harmless", "mcq", "contrast", "calibration", "domain", "corpus") -> path.
        models: Further models of a recovery ("aligned", "base", "unaligned") -> directory, `.gguf` file or hub id.
        judge: Command that judges answers, as a list of arguments; empty for none.
        concepts: (name, name it is to mean) of a redirection without a file of pairs.
        retain_model: A model that never saw the forget rows, for `forget.quality`.
        out: Output directory; None for a generated name.
        settings: Hyperparameters by name, strings or values; names with the prefix `eval.` are evaluation settings.
        seed: Seed of everything random.
        device: "auto", "cpu", "cuda" or "cuda:i".
        dtype: "auto", "float32", "bfloat16" or "float16".
        quantize: "none", "int8" or "nf4": how the matrices of the training model are held.
        batch_size: Rows per forward, "auto" to halve them when memory runs out, or None for the defaults.
        dry_run: Plan from headers and data only.
        require: Gates.
        until: Stop rule; None for the method's own, "none" for no rule.
        guard: "self", "none" or a data file; None for the method's default.
        link: Hard-link untouched files.
        force: Replace an existing output.
        resume: Go on from what an interrupted run left; start if it left nothing.
        save: "full", "patch" or "adapter": what is published.
        undo: Keep undo data beside a full result.
        keep_partial: Keep the checkpoint under its partial name when a gate fails.
        trust_remote_code: Run model code that the checkpoint brings.
        report: Leave a page for people beside the manifest.
        report_examples: Forget questions that it quotes with their answers.
        push: Hub repository that the finished result is uploaded to; None for none.
    """

    task: str
    method: str
    model: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    judge: tuple[str, ...] = ()
    concepts: tuple[str, str] | None = None
    retain_model: str | None = None
    out: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    batch_size: int | str | None = None
    dry_run: bool = False
    require: tuple[str, ...] = ()
    until: str | None = None
    guard: str | None = None
    link: bool = False
    force: bool = False
    resume: bool = False
    save: str = "full"
    undo: bool = True
    keep_partial: bool = False
    trust_remote_code: bool = False
    report: bool = False
    report_examples: int = 3
    push: str | None = None


@dataclass(frozen=True)
class EvaluationRequest:
    """What `eval` is asked for: checkpoints with data, or logs.

    Attributes:
        models: Directories, `.gguf` files or hub ids.
        data: Data name ("forget", "retain", "holdout", "authors", "facts", "text", "control", "harmful", "task",
            "harmless", "mcq", "contrast") -> path.
        judge: Command that judges answers, as a list of arguments; empty for none.
        source: The model before surgery.
        retain_model: A model that never saw the forget rows.
        logs: Logs to recompute figures from, instead of models.
        retain_log: The log of a model that never saw the forget rows.
        log: File to write the numbers per row to.
        settings: Evaluation settings by name.
        require: Gates.
        attacks: Names of the attacks that every model undergoes.
        suite: A published benchmark, which brings data and protocol; None for neither.
        suite_dir: Directory with its files.
        device: As for operations.
        dtype: As for operations.
        batch_size: Rows per forward, "auto" to halve them when memory runs out, or None for the default.
        trust_remote_code: Run model code that a checkpoint brings.
    """

    models: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    judge: tuple[str, ...] = ()
    source: str | None = None
    retain_model: str | None = None
    logs: tuple[str, ...] = ()
    retain_log: str | None = None
    log: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    require: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    suite: str | None = None
    suite_dir: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | str | None = None
    trust_remote_code: bool = False
