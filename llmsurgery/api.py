"""The toolkit as functions: one per task, the same things as the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from llmsurgery.errors import GateError, UsageError
from llmsurgery.run.request import EvaluationRequest, Request

if TYPE_CHECKING:
    from llmsurgery.compute.progress import Progress
    from llmsurgery.run.execute import Outcome

File = str | PathLike[str]


def operate(request: Request, progress: Progress | None = None) -> Outcome:
    """Run one operation.

    Args:
        request: What is asked for.
        progress: Told of long work and notices; silent by default.

    Returns:
        The manifest, the output directory and examples of answers.

    Raises:
        SurgeryError: See `llmsurgery.errors`; the source and earlier outputs are untouched.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.report.page import write_report
    from llmsurgery.run.execute import execute
    from llmsurgery.run.push import check_push

    told = progress or Silent()
    if request.push is not None:
        check_push(request.push)
    return _uploaded(execute(request, told, write_card, write_report), request.push, told)


def _uploaded(outcome: Outcome, repository: str | None, progress: Progress) -> Outcome:
    """Upload a result where a repository was given, and return it."""
    from llmsurgery.run.push import push_result

    if repository is not None and outcome.out is not None:
        push_result(outcome.out, repository, progress)
    return outcome


def _given(**files: File | None) -> dict[str, str]:
    return {name: fspath(path) for name, path in files.items() if path is not None}


class Options(TypedDict, total=False):
    """What every operation takes beside what it is about; see `unlearn`."""

    forget: File | None
    retain: File | None
    holdout: File | None
    retain_model: File | None
    authors: File | None
    facts: File | None
    text: File | None
    out: File | None
    settings: Mapping[str, object] | None
    seed: int
    device: str
    dtype: str
    quantize: str
    batch_size: int | str | None
    dry_run: bool
    require: Sequence[str]
    until: str | None
    guard: str | None
    link: bool
    force: bool
    resume: bool
    save: str
    undo: bool
    keep_partial: bool
    trust_remote_code: bool
    report: bool
    report_examples: int
    push: str | None
    progress: Progress | None


_DATA = ("forget", "retain", "holdout", "authors", "facts", "text")
_PATHS = ("retain_model", "out")


def _request(task: str, method: str, model: File | None, options: Options, /, **data: File | None) -> Request:
    """Return the request of an operation; `data` are the files that only this task has."""
    given: dict[str, Any] = {name: value for name, value in options.items() if name != "progress"}
    files = _given(**{name: given.pop(name, None) for name in _DATA}, **data)
    for name in _PATHS:
        given[name] = None if given.get(name) is None else fspath(given[name])
    given["settings"] = dict(given.get("settings") or {})
    given["require"] = tuple(given.get("require", ()))
    return Request(task=task, method=method, model=None if model is None else fspath(model), data=files, **given)


def unlearn(model: File | None = None, *, method: str, **options: Unpack[Options]) -> Outcome:
    """Make a model forget.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id; None runs the embedded demo.
        method: Method name, for example "flat".
        **options: What every operation takes:

            - forget: Data file of what is to be forgotten.
            - retain: Data file of what is to stay; measured, and trained on by methods that use it.
            - holdout: Data file of what the model never saw; adds `forget.min_k_auc`.
            - retain_model: A model that never saw the forget rows; adds `forget.quality`.
            - authors: Data file of facts about real authors with wrong answers; with `facts`, adds
              `utility.model_utility`.
            - facts: Data file of facts about the world with wrong answers.
            - text: Plain text for perplexity and KL; a shipped corpus by default.
            - out: Output directory; a free name below `llmsurgery-out` by default.
            - settings: Hyperparameters by name; `eval.NAME` for evaluation settings.
            - seed: Seed of everything random.
            - device: "auto", "cpu", "cuda" or "cuda:i".
            - dtype: Compute dtype: "auto", "float32", "bfloat16" or "float16".
            - quantize: How the matrices of the model in training are held: "none", "int8" or "nf4" (LoRA only).
            - batch_size: Rows per forward; "auto" halves them when memory runs out.
            - dry_run: Only plan and predict the peak of memory, from headers and data.
            - require: Gates such as "forget.token_prob<=0.2x".
            - until: Stop rule; the method's own by default, "none" for no rule.
            - guard: Protection of other answers: "self", "none" or a data file; "self" by default, "none" under a
              preset.
            - link: Hard-link untouched files.
            - force: Replace an existing output.
            - resume: Go on from what an interrupted run of the same command left.
            - save: What is published: "full" checkpoint, "patch" file or peft "adapter" (LoRA runs).
            - undo: Keep the undo data that `revert` needs.
            - keep_partial: Keep the unpublished checkpoint when a gate fails.
            - trust_remote_code: Run model code that the checkpoint brings.
            - report: Leave `report.html`, a page that needs neither network nor scripts, in the output (and
              `OUT.report.html` beside it when a gate fails).
            - report_examples: Forget questions that it quotes with the answers before and after.
            - push: Hub repository ("OWNER/NAME") that the finished result is uploaded to, without undo data and report;
              made, private, if it does not exist. Needs a token and the extra `hub`.
            - progress: Told of long work and notices.

    Returns:
        The manifest (`.manifest`), the output directory (`.out`) and examples of answers (`.examples`).

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    progress = options.get("progress")
    request = _request("unlearn", method, model, options)
    if method == "auto":
        from llmsurgery.compute.progress import Silent
        from llmsurgery.run.push import check_push
        from llmsurgery.run.search import search

        if request.push is not None:
            check_push(request.push)
        return search(request, progress or Silent(), lambda chosen: operate(chosen, progress))
    return operate(request, progress)


def redirect(
    model: File | None = None,
    *,
    method: str,
    source: str | None = None,
    target: str | None = None,
    pairs: File | None = None,
    **options: Unpack[Options],
) -> Outcome:
    """Point a concept elsewhere.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id; None runs the embedded demo.
        method: Method name, for example "rocr".
        source: The name whose meaning changes.
        target: The harmless name that it is to mean; methods that remove a concept need none.
        pairs: Data file of several such pairs, or of facts, in place of the two.
        **options: As for `unlearn`.

    Returns:
        As for `unlearn`.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    if source is None and target is not None:
        raise UsageError("--from is missing", "a name is redirected to another", "give both names")
    request = _request("redirect", method, model, options, pairs=pairs)
    if source is not None:
        request = dataclasses.replace(request, concepts=(source, target or ""))
    return operate(request, options.get("progress"))


def recover_alignment(
    model: File | None = None,
    *,
    method: str = "restore",
    aligned: File | None = None,
    harmful: File | None = None,
    task: File | None = None,
    harmless: File | None = None,
    base: File | None = None,
    unaligned: File | None = None,
    judge: Sequence[str] = (),
    picture: File | None = None,
    **options: Unpack[Options],
) -> Outcome:
    """Repair a model that lost its refusals in fine-tuning, with weights of the model it was made from.

    Args:
        model: The fine-tuned model: checkpoint directory, `.gguf` file or hub id, for "alignguard" the directory of a
            LoRA adapter; None runs the embedded demo.
        method: Method name.
        aligned: The aligned model that `model` was fine-tuned from, of the same shapes and tokenizer; the base of an
            adapter.
        harmful: Data file of prompts that the aligned model refuses, for "alignguard" with the refusal as completion if
            there is one; its text appears in no report.
        task: Data file of the task that the model was fine-tuned for.
        harmless: Data file of prompts that are answered; the other side of the refusal direction.
        base: The pretrained model before alignment, for "safe-lora".
        unaligned: A model with the harm in it, for "resta"; the toolkit never makes one.
        judge: A command as a list of arguments; it reads prompts and answers as JSON Lines and writes a verdict for
            each. Adds `safety.harmful_rate`.
        picture: PNG, SVG or PDF file for the gap along the refusal direction after every block, of parent, child and
            result; needs `harmful` beside `harmless` or `task`, and the extra `pictures`.
        **options: As for `unlearn`.

    Returns:
        As for `unlearn`; the manifest has `models` with what the further models are and what was measured on
        the aligned one.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.report.directions import save_gap
    from llmsurgery.report.heat import check_picture

    request = _request("recover-alignment", method, model, options, harmful=harmful, task=task, harmless=harmless)
    models = _given(aligned=aligned, base=base, unaligned=unaligned)
    if picture is not None:
        check_picture(fspath(picture))
        if model is not None and (harmful is None or (harmless is None and task is None)):
            raise UsageError(
                "--picture has nothing to draw",
                "the refusal direction lies between prompts that are refused and prompts that are answered",
                "give --harmful FILE and --harmless FILE (or --task FILE)",
            )
    outcome = operate(dataclasses.replace(request, models=models, judge=tuple(judge)), options.get("progress"))
    if picture is not None and outcome.out is not None:
        save_gap(outcome.manifest, fspath(picture))
    return outcome


def debias(
    model: File | None = None,
    *,
    method: str,
    mcq: File | None = None,
    contrast: File | None = None,
    **options: Unpack[Options],
) -> Outcome:
    """Take away a prior of answer letters, or a bias between groups.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id; None runs the embedded demo.
        method: Method name, for example "pride".
        mcq: Data file of multiple-choice questions; one half is learnt from, the other is measured in every cyclic
            order of the options. For a vision-language model, questions about pictures (`image`, a path relative to the
            file, `question`, `choices`, `answer`), measured with and without their pictures.
        contrast: Data file of texts that differ in a group.
        **options: As for `unlearn`.

    Returns:
        As for `unlearn`.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    return operate(_request("debias", method, model, options, mcq=mcq, contrast=contrast), options.get("progress"))


def prune(
    model: File | None = None,
    *,
    method: str,
    sparsity: float | None = None,
    pattern: str | None = None,
    of: str | None = None,
    hidden: int | None = None,
    layers: int | None = None,
    teacher: bool = False,
    calibration: File | None = None,
    domain: File | None = None,
    **options: Unpack[Options],
) -> Outcome:
    """Make a model sparser or smaller.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id; None runs the embedded demo.
        method: Method name, for example "wanda".
        sparsity: Share of the weights that is zeroed, or of the structures that are removed.
        pattern: "N:M" in place of it: zero N of every M consecutive inputs.
        of: What `sparsity` is a share of: "prunable" matrices or "all" parameters.
        hidden: Width that is kept, for methods that narrow the residual stream.
        layers: Number of blocks that are kept, for methods that remove blocks.
        teacher: Distil from the source while training, for methods that train.
        calibration: Data file of ordinary text that activations are taken from, or that is trained on; a shipped text
            by default.
        domain: Data file of the domain that the model is to stay good at; its last rows are only measured.
        **options: As for `unlearn`.

    Returns:
        As for `unlearn`.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.methods.amounts import amount_settings

    request = _request("prune", method, model, options, calibration=calibration, domain=domain)
    amounts = amount_settings(
        method, sparsity=sparsity, pattern=pattern, of=of, hidden=hidden, keep_layers=layers, teacher=teacher or None
    )
    request = dataclasses.replace(request, settings={**request.settings, **amounts})
    return operate(request, options.get("progress"))


def remove_layernorm(
    model: File | None = None,
    *,
    method: str = "fakeln",
    corpus: File | None = None,
    picture: File | None = None,
    **options: Unpack[Options],
) -> Outcome:
    """Train a model until its norms are affine maps, or fold the gains of its norms into its matrices.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id; None runs the embedded demo.
        method: "fakeln" trains, "fold" only folds.
        corpus: Data file of ordinary text to train on; its last windows are only measured.
        picture: PNG, SVG or PDF file for the constants of all norms over the steps; needs the extra `pictures`.
        **options: As for `unlearn`.

    Returns:
        As for `unlearn`.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.report.heat import check_picture

    request = _request("remove-layernorm", method, model, options, corpus=corpus)
    if picture is not None:
        check_picture(fspath(picture))
        if method == "fold" or request.save != "full" or request.dry_run:
            raise UsageError(
                "there is nothing to draw",
                "the picture shows the constants of norms in training, from what lies beside a whole checkpoint",
                "drop --picture, or run --method fakeln with --save full",
            )
    outcome = operate(request, options.get("progress"))
    if picture is not None and outcome.out is not None:
        from llmsurgery.report.sigmas import save_sigmas

        save_sigmas(outcome.out, fspath(picture))
    return outcome


def run_recipe(
    recipe: File,
    assignments: Sequence[str] = (),
    *,
    out: File | None = None,
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    keep_steps: bool = False,
    trust_remote_code: bool = False,
    report: bool = False,
    report_examples: int = 3,
    push: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Run a recipe: several operations in order, with gates; or repeat the run that a manifest records.

    Args:
        recipe: YAML or JSON file, name of a built-in recipe, `surgery.json` of a result, or the result's directory.
        assignments: Overrides such as "data.forget=rows.jsonl" or "steps.NAME.settings.lr=1e-4".
        out: Output directory; the recipe's, or a free name below `llmsurgery-out`, by default.
        dry_run: Only plan.
        force: Replace an existing output, and what an earlier run left.
        resume: Go on from what an interrupted run of the same recipe left.
        keep_steps: Keep the results of all steps in `OUT.steps`.
        trust_remote_code: Run model code that a checkpoint brings.
        report: As for `unlearn`.
        report_examples: As for `unlearn`, of each step.
        push: As for `unlearn`.
        progress: Told of long work and notices.

    Returns:
        The manifest of all steps together and the output directory; of a recipe of one step, what that returns.

    Raises:
        GateError: A gate after a step or at the end failed; the report lies beside the output.
        SurgeryError: See `llmsurgery.errors`; the source and earlier outputs are untouched.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.report.page import write_report
    from llmsurgery.run.builtin import find_recipe
    from llmsurgery.run.chain import Manner
    from llmsurgery.run.chain import run_recipe as run_chain
    from llmsurgery.run.overrides import load_recipe
    from llmsurgery.run.push import check_push

    told = progress or Silent()
    loaded = load_recipe(find_recipe(fspath(recipe)), assignments)
    place = None if out is None else fspath(out)
    manner = Manner(place, dry_run, force, resume, keep_steps, trust_remote_code, report, report_examples)
    if push is not None:
        check_push(push)
    done = run_chain(loaded, manner, lambda request: operate(request, told), write_card, write_report, told)
    return _uploaded(done, push, told)


def recipes(name: str | None = None, *, out: File | None = None, force: bool = False) -> Any:
    """List the built-in recipes, return one, or copy one to a file.

    Args:
        name: A built-in recipe; None lists all.
        out: File to write it to.
        force: Replace an existing file.

    Returns:
        A list of `{"name", "summary"}`, or `{"name", "summary", "text", "path"}` of one.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from pathlib import Path

    from llmsurgery.run.builtin import builtin_recipes, copy_builtin, read_builtin

    if name is None:
        if out is not None:
            raise UsageError(
                "-o is given without a recipe", "one is copied at a time", "llmsurgery recipes NAME -o FILE"
            )
        return [{"name": name, "summary": summary} for name, summary in builtin_recipes().items()]
    text = read_builtin(name)
    if out is not None:
        copy_builtin(text, Path(out), force)
    return {
        "name": name,
        "summary": builtin_recipes()[name],
        "text": text,
        "path": None if out is None else fspath(out),
    }


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
    data = _given(forget=forget, retain=retain, holdout=holdout, authors=authors, facts=facts, text=text)
    request = EvaluationRequest(
        models=tuple(fspath(model) for model in models),
        data=data
        | _given(control=control, harmful=harmful, task=task, harmless=harmless)
        | _given(mcq=mcq, contrast=contrast),
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


def inspect_checkpoint(model: File) -> dict[str, object]:
    """Describe a checkpoint from its headers: architecture, roles, shards, sizes, what each method could touch.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.run.inspect import inspect_model

    return inspect_model(fspath(model))


def trace(
    model: File,
    *,
    prompt: str | None = None,
    subject: str | None = None,
    answer: str | None = None,
    data: File | None = None,
    rows: int = 32,
    kinds: Sequence[str] = ("block", "mlp", "attention"),
    tokens: str = "all",
    window: int = 0,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 1,
    picture: File | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 256,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Trace where a model recalls facts; nothing is changed.

    The subject's embeddings are blurred by noise; states of the clean run are put back, one token and layer (or window
    of layers) at a time, and the part of the answer's probability that returns is the indirect effect.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        prompt: Text that the model goes on from, as it stands.
        subject: Words of the prompt that are blurred.
        answer: What the model answers; its own next token by default. Of several tokens the product counts.
        data: Data file of facts in place of `prompt`; effects are averaged. A row's subject is its key `subject`, or
            the names in its question; rows without one, and facts that the model does not know, are left out and
            counted. Words of an answer that only repeat the question are given, and what follows is traced.
        rows: Rows of `data` that are read; 0 for all.
        kinds: "block", "mlp" and "attention", what is put back.
        tokens: "all", or "subject" for those of the subject alone.
        window: Layers put back at once for "mlp" and "attention"; 0 for a fifth of them, at most 10.
        noise: Noise in standard deviations of the subjects' embeddings; doubled while it is too weak.
        samples: Noise samples per fact.
        seed: Seed of the noise.
        picture: PNG, SVG or PDF file for the heat maps; needs the extra `pictures`.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        batch_size: Rows per forward at most.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of long work and notices.

    Returns:
        `clean`, `corrupted`, `total_effect`, `noise`, `window`, `facts` and, per kind and group of tokens, `groups`
        with one effect per layer, and `strong_layers`, those with at least half of the highest effect at the last
        subject token; for a single fact also `answer`, `tokens` and `effects` per token.

    Raises:
        InputError: The model does not know the answer.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.heat import check_picture, save_picture
    from llmsurgery.run.trace import TraceRequest, trace_model

    if picture is not None:
        check_picture(fspath(picture))
    request = TraceRequest(
        fspath(model),
        prompt,
        subject,
        answer,
        None if data is None else fspath(data),
        rows,
        tuple(kinds),
        tokens,
        window,
        noise,
        samples,
        seed,
        device,
        dtype,
        batch_size,
        trust_remote_code,
    )
    document = trace_model(request, progress or Silent())
    if picture is not None:
        save_picture(document, fspath(picture))
    return document


def neurons(
    model: File,
    *,
    find: str | None = None,
    layers: str | None = None,
    side: str = "in",
    top: int = 20,
    tokens: int = 5,
    fold_norms: bool = False,
    compare: File | None = None,
    picture: File | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, object]:
    """Name the neurons of the MLPs by the tokens that their weights point to in the head; nothing is changed.

    The model is never loaded: matrices are read one by one, and logits exist for a block of tokens at a time.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        find: List neurons with a form of this word (case, blank, plural) among their first tokens; else the clearest.
        layers: Blocks to look at, such as "0,3-5"; all by default.
        side: "in" for the vectors that read the residual stream (up), "gate" for those that open, "out" for those that
            write (down), "both" for in and out.
        top: Neurons listed, by z of the token they are listed for; 0 for all.
        tokens: First tokens kept of each neuron.
        fold_norms: Multiply by the gains of the norm before (or after) the MLP and of the final norm.
        compare: A checkpoint of the same shape; the share of neurons with the same first token is added.
        picture: PNG, SVG or PDF file for the map of tokens and layers; needs the extra `pictures`.
        device: Where the products are computed.
        progress: Told of long work.

    Returns:
        `decoded` vectors per side, `found`, the listed `neurons` (layer, neuron, part, expert, side, z, margin, p,
        tokens), `map` with the largest z of some tokens per layer, `agreeing` (side both) and `compare`.

    Raises:
        InputError: No form of the word is a single token.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.heat import check_picture
    from llmsurgery.report.neurons import save_neurons
    from llmsurgery.run.neurons import NeuronsRequest, find_neurons

    if picture is not None:
        check_picture(fspath(picture))
    other = None if compare is None else fspath(compare)
    request = NeuronsRequest(fspath(model), find, layers, side, top, tokens, fold_norms, other, device)
    document = find_neurons(request, progress or Silent())
    if picture is not None:
        save_neurons(document, fspath(picture))
    return document


def lens(
    model: File,
    prompt: str,
    *,
    token: str | None = None,
    top: int = 5,
    site: str = "block",
    picture: File | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, object]:
    """Read what a model would say after every layer, by its own final norm and head; nothing is changed.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        prompt: Text that the model goes on from, as it stands.
        token: A word whose first token is followed: its probability and rank are added to every reading.
        top: First tokens of each reading.
        site: "block" for the residual stream after each block, "attention" and "mlp" for what these add to it,
            "middle" for the residual between them.
        picture: PNG, SVG or PDF file; needs the extra `pictures`.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        trust_remote_code: Run model code that the checkpoint brings.

    Returns:
        `tokens` of the prompt, and `readings`: for each layer, the embedding first, one entry of `positions` per token
        with its `top` tokens and, for `token`, `p` and `rank`. The last layer is the model's own answer.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.report.heat import check_picture
    from llmsurgery.report.lens import save_lens
    from llmsurgery.run.lens import LensRequest, read_through_lens

    if picture is not None:
        check_picture(fspath(picture))
    document = read_through_lens(LensRequest(fspath(model), prompt, token, top, site, device, dtype, trust_remote_code))
    if picture is not None:
        save_lens(document, fspath(picture))
    return document


def audit(
    kind: str,
    data: File,
    model: File,
    *,
    keep: float = 0.05,
    score: str = "ln_ches",
    end: bool = True,
    reference: File | None = None,
    window: int = 8,
    tau: float = 20.0,
    most_found: int = 3,
    every: bool = False,
    out: File | None = None,
    picture: File | None = None,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Score preference or fine-tuning data with a model's help, and write what passes a filter; nothing is changed.

    Args:
        kind: "ches": how alike the two answers of a pair are to the model; training on such a pair lowers the
            likelihood of both. "bci": how improbable the spans of an answer were in a reference corpus.
        data: Data file of preference pairs; "bci" takes rows with one answer as well.
        model: Checkpoint directory, `.gguf` file or hub id; "bci" uses its tokenizer alone.
        keep: For "ches", the share of the pairs that is kept, those with the lowest scores.
        score: For "ches", what the filter goes by: "ln_ches", or "ches", which follows the answers' length.
        end: For "ches", whether answers have their end token, as in training.
        reference: For "bci", data file of the corpus.
        window: For "bci", tokens of a span.
        tau: For "bci", the BCI in nats above which a span is flagged.
        most_found: For "bci", spans that the reference holds more often do not count; 0 for no bound.
        every: For "bci", whether spans that the reference does not hold count too.
        out: Output directory for `scores.jsonl` (numbers only), `kept.jsonl` (rows as they were) and `audit.json`; a
            free name below `llmsurgery-out` by default.
        picture: PNG, SVG or PDF file for the distribution of the scores; needs the extra `pictures`.
        force: Replace an existing output.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        batch_size: Rows per forward at most.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of long work and notices.

    Returns:
        The manifest, with `export` "none"; `operations[0].record` holds counts and quantiles of the scores.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.audit import publish_audit
    from llmsurgery.run.audit import AuditRequest

    corpus = None if reference is None else fspath(reference)
    request = AuditRequest(
        kind, fspath(data), fspath(model), keep, score, end, corpus, window, tau, most_found, every, device, dtype,
        batch_size, trust_remote_code,
    )  # fmt: skip
    places = (None if path is None else fspath(path) for path in (out, picture))
    place, drawing = places
    return publish_audit(request, place, force, drawing, progress or Silent())


def linearity(
    model: File,
    *,
    source: File | None = None,
    text: File | None = None,
    require: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, object]:
    """Check how linear a model's norms are, and what direct logit attribution is worth; nothing is changed.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        source: The model before its norms were removed, to compare with.
        text: Data file of plain text; a shipped text by default.
        require: Gates on `linearity.norm_error` and `linearity.attribution_error`.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        trust_remote_code: Run model code that a checkpoint brings.

    Returns:
        `models`: "model", and "source" where given -> `path`, `figures`, `norms` with the error of each and
        `components` with that of each component's attribution; `gates`, and `tokens` that were looked at.

    Raises:
        GateError: A gate failed.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.run.linearity import LinearityRequest, check_linearity

    paths = [None if one is None else fspath(one) for one in (source, text)]
    return check_linearity(
        LinearityRequest(fspath(model), paths[0], paths[1], tuple(require), device, dtype, trust_remote_code)
    )


def diff(
    before: File, after: File, *, out: File | None = None, force: bool = False, progress: Progress | None = None
) -> dict[str, object]:
    """Compare two checkpoints, and optionally write the patch that leads from the first to the second.

    Args:
        before: Checkpoint directory, `.gguf` file or hub id.
        after: The same.
        out: Patch file to write.
        force: Replace an existing patch file.
        progress: Told of long work.

    Returns:
        Per role and per changed tensor: entries changed and relative norm; tensors that only one holds; side files
        that differ; the patch's path and size.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.run.diff import diff_checkpoints

    place = None if out is None else fspath(out)
    return diff_checkpoints(fspath(before), fspath(after), place, force, progress or Silent())


def apply(
    patch: File,
    base: File,
    *,
    out: File,
    link: bool = False,
    force: bool = False,
    undo: bool = True,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Apply a patch to the base it was made for; the result has the bytes that the patch was made from.

    Args:
        patch: Patch file, or the directory of a `--save patch` run.
        base: Checkpoint directory, `.gguf` file or hub id.
        out: Output directory.
        link: Hard-link untouched files.
        force: Replace an existing output.
        undo: Keep the undo data that `revert` needs.
        progress: Told of long work.

    Returns:
        The manifest.

    Raises:
        InputError: The patch is for another base.
        DamagedError: The patch is damaged.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.run.apply import apply_file

    return apply_file(
        fspath(patch), fspath(base), fspath(out), link, force, undo, progress or Silent(), write_card
    )  # fmt: skip


def stack(
    patches: Sequence[File],
    base: File,
    *,
    out: File | None = None,
    save: str = "full",
    allow_overlap: bool = False,
    link: bool = False,
    force: bool = False,
    undo: bool = True,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Put several patches for one base together.

    Patches of different tensors go together in any order, and so do low-rank changes of one tensor (they are summed
    and rounded once), changes of different entries, and equal ones.

    Args:
        patches: Patch files, or directories of `--save patch` runs; their order matters with `allow_overlap` alone.
        base: The checkpoint that all of them were made for.
        out: Output directory, or file of the one patch; None only looks for conflicts.
        save: "full" for a checkpoint, "patch" for one patch that does what all of them do.
        allow_overlap: Where they conflict, let the later one overwrite what the earlier one made.
        link: Hard-link untouched files.
        force: Replace an existing output.
        undo: Keep the undo data that `revert` needs.
        progress: Told of long work.

    Returns:
        The manifest of a checkpoint, else what would be or was put together; with `overlaps`, every tensor or file
        that two patches change, and how they meet.

    Raises:
        InputError: A patch is for another base, or two patches conflict; names the tensors.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.card import write_card
    from llmsurgery.run.stack import StackRequest, stack_patches

    place = None if out is None else fspath(out)
    request = StackRequest(
        tuple(fspath(patch) for patch in patches), fspath(base), place, save, allow_overlap, link, force, undo
    )
    return stack_patches(request, progress or Silent(), write_card)


def revert(
    result: File, *, out: File, link: bool = False, force: bool = False, progress: Progress | None = None
) -> dict[str, object]:
    """Give the source of a result back, bit for bit, from the undo data beside the result.

    Args:
        result: Output directory of an operation or of `apply`.
        out: Directory for the source.
        link: Hard-link untouched files.
        force: Replace an existing output.
        progress: Told of long work.

    Returns:
        What was restored.

    Raises:
        InputError: There is nothing to revert.
        DamagedError: The result was changed, or the undo data are damaged.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.run.apply import revert_result

    return revert_result(fspath(result), fspath(out), link, force, progress or Silent())


def verify(
    path: File, *, base: File | None = None, trust_remote_code: bool = False, progress: Progress | None = None
) -> dict[str, object]:
    """Check a result: hashes, finite weights, stock loadability.

    Args:
        path: Checkpoint directory, with or without `surgery.json`, or the directory of a patch or adapter.
        base: The model it was made from; everything that was not edited must be equal to it.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of long work.

    Returns:
        The checks, all of which passed.

    Raises:
        DamagedError: Something differs.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.run.verify import verify_result

    return verify_result(
        fspath(path), None if base is None else fspath(base), trust_remote_code, progress or Silent()
    )  # fmt: skip


def compare(
    recipes: Sequence[str],
    model: File | None = None,
    *,
    forget: File | None = None,
    retain: File | None = None,
    text: File | None = None,
    unseen: File | None = None,
    attacks: Sequence[str] = (),
    control: File | None = None,
    settings: Mapping[str, object] | None = None,
    retain_model: File | None = None,
    out: File | None = None,
    keep: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | str | None = None,
    force: bool = False,
    report: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Run several recipes on one model and the same data, each in a process of its own, and put them side by side.

    Args:
        recipes: `METHOD`, `METHOD:NAME=VALUE:...`, or YAML files with `method`, `settings`, `guard`, `until`, `seed`.
        model: Checkpoint directory, `.gguf` file or hub id; None for the embedded demo.
        forget: Data file of what is to be forgotten.
        retain: Data file of what is to stay.
        text: Plain text for perplexity.
        unseen: Data file of rows like the retain rows that no recipe is given; only measured.
        attacks: Attacks that every result is put to.
        control: As for `evaluate_checkpoints`.
        settings: Settings of the attacks, `attack.NAME` and `attack.ATTACK.NAME`; those of methods are in the recipes.
        retain_model: A model that never saw the forget rows: the control of the attacks, and for `forget.quality`.
        out: Directory for `compare.json`, `compare.md` and `compare.svg` (with matplotlib); by default a new one.
        keep: Keep every result below `out`.
        seed: Seed of every recipe that names none.
        device: As for operations.
        dtype: As for operations.
        batch_size: Rows per forward; "auto" halves them when memory runs out.
        force: Replace an existing output.
        report: Leave `report.html`, a page for people, in the output as well.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of every run.

    Returns:
        `rows` with figures, cost and exit code of every recipe, and the labels on the Pareto `front`.

    Raises:
        SurgeryError: A recipe, the data or the model is wrong; nothing has run then.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.comparison import publish_comparison
    from llmsurgery.run.compare import Attacking, read_recipes

    request = Request(
        task="unlearn",
        method="",
        model=None if model is None else fspath(model),
        data=_given(forget=forget, retain=retain, text=text),
        retain_model=None if retain_model is None else fspath(retain_model),
        seed=seed,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    place = None if out is None else fspath(out)
    return publish_comparison(
        read_recipes(recipes),
        request,
        Attacking(tuple(attacks), None if control is None else fspath(control), dict(settings or {})),
        place,
        keep,
        progress or Silent(),
        None if unseen is None else fspath(unseen),
        report,
    )
