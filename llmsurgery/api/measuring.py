"""Measuring checkpoints and logs; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING

from llmsurgery.api.requests import File, given_files
from llmsurgery.errors import GateError, UsageError
from llmsurgery.run.request import EvaluationRequest

if TYPE_CHECKING:
    from llmsurgery.compute.progress import Progress


def evaluate_checkpoints(
    models: Sequence[File],
    *,
    forget: File | None = None,
    retain: File | None = None,
    holdout: File | None = None,
    authors: File | None = None,
    facts: File | None = None,
    text: File | None = None,
    harmful: File | None = None,
    task: File | None = None,
    harmless: File | None = None,
    judge: Sequence[str] = (),
    mcq: File | None = None,
    contrast: File | None = None,
    source: File | None = None,
    retain_model: File | None = None,
    retain_log: File | None = None,
    log: File | None = None,
    attacks: Sequence[str] = (),
    control: File | None = None,
    suite: str | None = None,
    suite_dir: File | None = None,
    position_invariant: bool = False,
    settings: Mapping[str, object] | None = None,
    require: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | str | None = None,
    report: File | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure checkpoints.

    Args:
        models: Checkpoint directories, `.gguf` files or hub ids.
        forget: Data file of what was to be forgotten.
        retain: Data file of what was to stay.
        holdout: Data file of what the model never saw, for `forget.min_k_auc`.
        authors: Facts about real authors with wrong answers, for `utility.model_utility`.
        facts: Facts about the world with wrong answers, for `utility.model_utility`.
        text: Plain text; a shipped corpus by default.
        harmful: Prompts that are to be refused; with `source`, refusals are compared with its own.
        task: Data file of a task that a model was fine-tuned for.
        harmless: Prompts that are to be answered.
        judge: As for `recover_alignment`.
        mcq: Multiple-choice questions, asked by letter in every cyclic order of the options.
        contrast: Pairs in the layout of CrowS-Pairs, for `bias.stereotype_rate`.
        source: The model before surgery, for `utility.kl`, `utility.ppl_ratio` and relative gates.
        retain_model: A model that never saw the forget rows, for `forget.quality`.
        retain_log: The log of such a model, in either published layout.
        log: File to write the numbers per row to; they hold no text.
        attacks: Attacks that every model undergoes ("relearn", "quantize", ...); they need `forget` and `source`,
            and `retain_model` is their control.
        control: Data file of rows of the same form that the source does not know; where there is no `retain_model`,
            what relearning adds to them is taken off what it brings back.
        suite: A published benchmark ("tofu", "muse", "wmdp", "semeval25", "ort"), whose files bring the data and
            whose protocol is the default; data other than `text` do not go with it.
        suite_dir: Directory with the suite's files as published.
        position_invariant: Ask `mcq` by position-invariant inference (PINE) too, and count the answers that change with
            the order of options, with it and without.
        settings: Evaluation settings by name; `attack.NAME` and `attack.ATTACK.NAME` for attacks, `suite.NAME` for
            the suite.
        require: Gates that every model must pass.
        device: As for `unlearn`.
        dtype: As for `unlearn`.
        batch_size: Rows per forward; "auto" halves them when memory runs out.
        report: HTML file for a page of the figures, written when a gate fails, too.
        trust_remote_code: Run model code that a checkpoint brings.
        progress: Told of long work.

    Returns:
        `{"models": [{"path", "metrics", "gates"}], "source": ..., "retained": ..., "data": ..., "evaluation": ...}`;
        with attacks, each model has `attacks` by name, and the document the `attacks` that they share; with a suite,
        the document has `suite`: its name, protocol, settings, and what departs from the protocol.

    Raises:
        GateError: A model failed a gate.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.run.evaluate import evaluate_models

    if not models:
        raise UsageError("no model is given", "eval measures one or more checkpoints", "llmsurgery eval MODEL...")
    data = given_files(forget=forget, retain=retain, holdout=holdout, authors=authors, facts=facts, text=text)
    request = EvaluationRequest(
        models=tuple(fspath(model) for model in models),
        data=data
        | given_files(control=control, harmful=harmful, task=task, harmless=harmless)
        | given_files(mcq=mcq, contrast=contrast),
        judge=tuple(judge),
        source=None if source is None else fspath(source),
        retain_model=None if retain_model is None else fspath(retain_model),
        retain_log=None if retain_log is None else fspath(retain_log),
        log=None if log is None else fspath(log),
        attacks=tuple(dict.fromkeys(attacks)),
        suite=suite,
        suite_dir=None if suite_dir is None else fspath(suite_dir),
        settings={**(settings or {}), **({"position_invariant": True} if position_invariant else {})},
        require=tuple(require),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    return _with_page(report, lambda: evaluate_models(request, progress or Silent()))


def evaluate_logs(
    logs: Sequence[File],
    *,
    retain_log: File | None = None,
    log: File | None = None,
    settings: Mapping[str, object] | None = None,
    require: Sequence[str] = (),
    report: File | None = None,
) -> dict[str, object]:
    """Recompute figures from published TOFU logs, or from logs of `evaluate_checkpoints`, without a model.

    Args:
        logs: open-unlearning's `TOFU_EVAL.json` or TOFU's `eval_log_aggregated.json`.
        retain_log: The log of a model that never saw the forget rows, for `forget.quality`.
        log: File to write the numbers per row to, in open-unlearning's layout.
        settings: Evaluation settings by name; `protocol` matters most.
        require: Gates that every log must pass.
        report: As for `evaluate_checkpoints`.

    Returns:
        As for `evaluate_checkpoints`.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.run.from_log import evaluate_logs as recompute

    request = EvaluationRequest(
        logs=tuple(fspath(path) for path in logs),
        retain_log=None if retain_log is None else fspath(retain_log),
        log=None if log is None else fspath(log),
        settings=dict(settings or {}),
        require=tuple(require),
    )
    return _with_page(report, lambda: recompute(request))


def _with_page(report: File | None, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Measure, and write a page of it where one is asked for, that of a failed gate included."""
    from llmsurgery.report.tables_page import check_page, measurement_page, write_page

    if report is None:
        return measure()
    check_page(fspath(report))
    try:
        document = measure()
    except GateError as error:
        if error.report is not None:
            write_page(fspath(report), measurement_page(error.report))
        raise
    write_page(fspath(report), measurement_page(document))
    return document
