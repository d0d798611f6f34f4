"""The operations: each applies one method and writes a new checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import fspath
from typing import TYPE_CHECKING, Unpack

from llmsurgery.api.requests import File, Options, given_files, make_request, operate
from llmsurgery.errors import UsageError

if TYPE_CHECKING:
    from llmsurgery.run.execute import Outcome


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
    request = make_request("unlearn", method, model, options)
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
    request = make_request("redirect", method, model, options, pairs=pairs)
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

    request = make_request("recover-alignment", method, model, options, harmful=harmful, task=task, harmless=harmless)
    models = given_files(aligned=aligned, base=base, unaligned=unaligned)
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
    return operate(make_request("debias", method, model, options, mcq=mcq, contrast=contrast), options.get("progress"))


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

    request = make_request("prune", method, model, options, calibration=calibration, domain=domain)
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
    from llmsurgery.methods.registry import find_method
    from llmsurgery.report.heat import check_picture

    request = make_request("remove-layernorm", method, model, options, corpus=corpus)
    if picture is not None:
        check_picture(fspath(picture))
        if request.save != "full" or request.dry_run or not find_method(method, request.task).spec.trained:
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
