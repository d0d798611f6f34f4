"""`eval`: the same figures for any number of checkpoints, optionally against the model before surgery."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery import __version__
from llmsurgery.arch.bundle import plain_config, require_trust
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, file_digest
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.data import GENERAL_TEXT
from llmsurgery.data.asked import Asked
from llmsurgery.data.pictured import shows_pictures
from llmsurgery.data.records import Row
from llmsurgery.errors import GateError, ResourceError, UnsupportedError, UsageError
from llmsurgery.evaluate.config import EvaluationConfig, settle
from llmsurgery.evaluate.gates import ROW_NEEDS, Gate, check_gates, parse_gate, require_data
from llmsurgery.evaluate.logs import read_retain_log
from llmsurgery.methods.settings import as_record, resolve_config
from llmsurgery.run.attack import (
    add_attacks,
    attack_figures,
    plan_attacks,
    refuse_relative,
    run_attacks,
    split_settings,
)
from llmsurgery.run.choices import NAMES as ASKED
from llmsurgery.run.choices import asked_needs, read_asked
from llmsurgery.run.encoding import encode_for_figures, encode_pictures, make_encoder, require_known_tokens
from llmsurgery.run.files import CONTROL, data_digest, read_sets
from llmsurgery.run.fitting import parse_batch_size, scoring_rows
from llmsurgery.run.manifest import data_records, figure_record, gate_record
from llmsurgery.run.needs import offered_needs, row_needs
from llmsurgery.run.recover import DATA as RECOVERY
from llmsurgery.run.recover import encode_recovery, measure_recovery, recovery_needs
from llmsurgery.run.reference import score_retain_model
from llmsurgery.run.request import EvaluationRequest
from llmsurgery.run.source import stored_dtype
from llmsurgery.run.suite import SuitePlan, plan_suite

if TYPE_CHECKING:
    from llmsurgery.arch.spec import Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.evaluate.figures import Measurement
    from llmsurgery.evaluate.intervals import Figure
    from llmsurgery.evaluate.pictured import PicturedSet
    from llmsurgery.evaluate.scores import SetScores

AGAINST_SOURCE = ("utility.kl", "utility.ppl_ratio", "ort.form_gap", "safety.direction_gap")

_UTILITY = "utility.model_utility"
EITHER_CONTROL = "control-of-any-kind"


def evaluate_models(request: EvaluationRequest, progress: Progress) -> dict[str, object]:
    """Measure checkpoints on the same data; see `llmsurgery.api.evaluate_checkpoints` for the result."""
    from llmsurgery.compute.device import memory_errors, resolve_device

    request = dataclasses.replace(request, batch_size=parse_batch_size(request.batch_size))
    request, suite = plan_suite(request)
    config = evaluation_config(request)
    plan = plan_attacks(request)
    files = {"text": GENERAL_TEXT, **{name: Path(path) for name, path in request.data.items()}}
    given = set(files) | offered_needs(config, bool(request.retain_model or request.retain_log)) | plan.needs
    given |= {"retain-weights", EITHER_CONTROL} if request.retain_model else set()
    given |= {EITHER_CONTROL} if CONTROL in files else set()
    given |= recovery_needs(files, bool(request.judge))
    given |= suite.needs if suite is not None else set()
    given |= {"letters"} if {"mcq", "suite:wmdp"} & given else set()
    pictures = "mcq" in files and shows_pictures(files["mcq"])
    given = given - {"mcq", "letters"} | {"pictures"} if pictures else given
    gates = [parse_gate(text, given | ROW_NEEDS) for text in request.require]
    _check_options(request, gates, suite)
    if config.position_invariant and "mcq" not in files:
        raise UsageError(
            "--position-invariant needs --mcq", "the options of its questions are what is listed", "give --mcq DATA"
        )
    rows = read_sets({name: path for name, path in files.items() if name not in ASKED})
    asked = read_asked(files, pictures)
    # Attacks alone look at the control rows.
    figured = {name: members for name, members in rows.items() if name != CONTROL}
    if suite is not None:
        suite.check(rows, config)
    for gate in gates:
        require_data(gate, given | row_needs(rows, config) | asked_needs(asked))
    plan.check(rows)
    retained_log = None if request.retain_log is None else read_retain_log(request.retain_log)
    retained_model = None if request.retain_model is None else Checkpoint.open(resolve_source(request.retain_model))
    source = None if request.source is None else Checkpoint.open(resolve_source(request.source))
    places = [Checkpoint.open(resolve_source(model)) for model in request.models]
    retained = None if retained_log is None else first_rows(retained_log.scores, config)

    def measure_all(size: int) -> tuple[Measurement | None, list[Measurement]]:
        """Measure every model with the same number of rows per forward: figures of 16-bit models depend on it."""
        own = dataclasses.replace(config, batch_size=size)
        compared = retained
        if retained_model is not None:
            options = (resolve_device(request.device), request.dtype, request.trust_remote_code)
            compared = score_retain_model(retained_model, figured, own, *options, progress, suite)
        before = None
        if source is not None:
            before = _measure_one(source, figured, own, request, progress, compared, None, suite, asked)
        options_of = (figured, own, request, progress, compared, before, suite, asked)
        return before, [_measure_one(place, *options_of) for place in places]

    forward = scoring_rows(config, request.batch_size, progress)
    with memory_errors():
        before, results = forward.run(measure_all)
        attacked = run_attacks(plan, places, source, retained_model, rows, config, request, progress)
    config = dataclasses.replace(config, batch_size=forward.size)
    if {"authors", "facts"} & set(files) and _UTILITY not in results[0].figures:
        progress.notice(f"{_UTILITY} needs --retain, --authors and --facts, all with perturbed_answer, and answers")
    kept = [_without_source(result.figures, before is not None) for result in results]
    if request.log is not None:
        write_log(request.log, results[0].scores, kept[0], config)
    for figures, found in zip(kept, attacked, strict=True):
        figures.update(attack_figures(found))
    records, failed = judge(request.models, kept, gates, before.figures if before else {})
    source_figures = {} if before is None else before.figures
    document: dict[str, object] = {
        "models": records,
        "source": None
        if before is None
        else {"path": request.source, "metrics": {key: figure_record(one) for key, one in source_figures.items()}},
        "retained": retained_record(request),
        "data": _data_record(files, {**rows, **asked.members}, suite),
        "evaluation": as_record(config),
    }
    if suite is not None:
        document["suite"] = suite.record(config)
    if plan.attacks:
        add_attacks(document, plan, attacked, request)
    require_gates(failed, document)
    return document


def evaluation_config(request: EvaluationRequest) -> EvaluationConfig:
    """Resolve the settings of an evaluation, those that depend on the protocol included."""
    chosen = split_settings(request.settings)[0]
    if isinstance(request.batch_size, int):
        chosen.setdefault("batch_size", request.batch_size)
    config = settle(resolve_config(EvaluationConfig, chosen))
    if config.figures != "all":
        raise UsageError(f"eval has no figures={config.figures}", "it loads whole models", "drop the setting")
    return config


def _check_options(request: EvaluationRequest, gates: Sequence[Gate], suite: SuitePlan | None) -> None:
    """Refuse options that contradict each other, before any work."""
    if request.retain_model is not None and request.retain_log is not None:
        raise UsageError("--retain-model and --retain-log are given", "both say what to compare with", "give one")
    for name in ("retain_model", "retain_log"):
        if getattr(request, name) is not None and "forget" not in request.data and suite is None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} needs --forget", "models are compared on the forget rows", "give --forget DATA")
    if "holdout" in request.data and "forget" not in request.data:
        raise UsageError("--holdout needs --forget", "its rows are compared with the forget rows", "give --forget DATA")
    if request.judge and "harmful" not in request.data:
        raise UsageError("--judge needs --harmful", "it judges the answers to these prompts", "give --harmful DATA")
    if CONTROL in request.data and not request.attacks:
        raise UsageError("--control needs --attack relearn", "attacks alone look at its rows", "drop --control")
    check_log_target(request)
    refuse_relative(gates)
    for gate in gates:
        if request.source is None and (gate.relative or gate.metric in AGAINST_SOURCE):
            raise UsageError(f"gate {gate} needs --source", "it compares with the model before", "give --source MODEL")


def check_log_target(request: EvaluationRequest) -> None:
    """Refuse a log that would overwrite a file or hold more than one model.

    Raises:
        UsageError: Either.
    """
    if request.log is None:
        return
    if len(request.models) + len(request.logs) > 1:
        raise UsageError("--log holds one model", "several are given", "evaluate them one by one")
    if Path(request.log).exists():
        raise UsageError(f"{request.log} exists", "a log is never overwritten", "give --log another name")
    if not Path(request.log).parent.is_dir():
        raise UsageError(f"the folder of {request.log} does not exist", "the log has no place", "make the folder first")


def _measure_one(
    checkpoint: Checkpoint,
    rows: Mapping[str, Sequence[Row]],
    config: EvaluationConfig,
    request: EvaluationRequest,
    progress: Progress,
    retained: Mapping[str, SetScores] | None,
    before: Measurement | None,
    suite: SuitePlan | None,
    asked: Asked,
) -> Measurement:
    """Load one checkpoint and measure it; without `before`, keep what later ones are compared with."""
    from llmsurgery.compute.device import resolve_device, resolve_dtype
    from llmsurgery.compute.load import load_model
    from llmsurgery.evaluate.figures import measure
    from llmsurgery.evaluate.judge import make_judge

    require_trust(checkpoint.config, checkpoint.root, request.trust_remote_code)
    encoder = make_encoder(checkpoint)
    data = encode_for_figures(encoder, rows, config, asked=asked)
    structure = detect(plain_config(checkpoint.config), checkpoint.tensors)
    own = None if suite is None else suite.encode(encoder, data, config)
    require_known_tokens(data, structure, () if own is None else own.encoded)
    reference = None if before is None else before.reference
    if reference is not None and [text.ids for text in data.texts] != reference.ids:
        raise UsageError(
            f"{checkpoint.root} and the source of --source have different tokenizers",
            "distributions over different tokens cannot be compared",
            "measure it without --source",
        )
    pictured = _pictures(checkpoint, structure, encoder, asked)
    place = resolve_device(request.device)
    wanted = resolve_dtype(request.dtype, stored_dtype(checkpoint), place)
    model = load_model(checkpoint.root, wanted, place, request.trust_remote_code, structure.family.buffers)
    keep = before is None and request.source is not None
    measured = measure(model, encoder, data, config, progress, reference, keep, retained)
    if pictured is not None:
        from llmsurgery.evaluate.pictured import measure_pictured

        seen = measure_pictured(model, pictured, config.batch_size, progress, None)
        measured = dataclasses.replace(measured, figures={**seen, **measured.figures})
    if any(name in rows for name in RECOVERY):
        prompts = encode_recovery(encoder, rows)
        require_known_tokens(data, structure, [*prompts.harmful, *prompts.harmless, *prompts.task])
        recovery = measure_recovery(
            model, structure, encoder, prompts, config, make_judge(request.judge, config.judge_seconds),
            None if before is None else before.recovery, progress,
        )  # fmt: skip
        both = {**recovery.figures_of_aligned, **measured.figures}
        measured = dataclasses.replace(measured, figures=both, recovery=recovery)
    if own is None:
        return measured
    figures = own.measure(model, encoder, measured, config.batch_size, progress, before)
    return dataclasses.replace(measured, figures={**measured.figures, **figures})


def _pictures(checkpoint: Checkpoint, structure: Structure, encoder: Encoder, asked: Asked) -> PicturedSet | None:
    """Return questions about pictures as prompts, None without any.

    Raises:
        UnsupportedError: The model sees no pictures.
    """
    if asked.pictured is not None and not structure.family.inner_key:
        raise UnsupportedError(
            f"{checkpoint.root} sees no pictures, and --mcq is about some",
            f"{structure.family.name} models are text models",
            "give a vision-language model, or questions without images",
        )
    return encode_pictures(checkpoint, encoder, asked)


def _data_record(
    files: Mapping[str, Path], rows: Mapping[str, Sequence[object]], suite: SuitePlan | None
) -> dict[str, object]:  # fmt: skip
    """Return path, digest and number of rows of every file, those of a suite included."""
    hashes = {name: data_digest(path, rows[name]) for name, path in files.items()}
    found = data_records(files, rows, hashes)
    return found if suite is None else found | data_records(suite.files, suite.rows, suite.digests)


def _without_source(figures: Mapping[str, Figure], compared: bool) -> dict[str, Figure]:
    return {key: figure for key, figure in figures.items() if compared or key not in AGAINST_SOURCE}


def judge(
    names: Sequence[str], figures: Sequence[Mapping[str, Figure]], gates: Sequence[Gate], before: Mapping[str, Figure]
) -> tuple[list[dict[str, object]], list[str]]:
    """Return the record of every model or log, gates included, and what failed.

    `forget.quality` is null, never 0, where truth ratios have nothing to be compared with.
    """
    results: list[dict[str, object]] = []
    failed: list[str] = []
    for name, found in zip(names, figures, strict=True):
        values = {key: figure.number for key, figure in found.items()}
        outcomes = check_gates(list(gates), values, {key: figure.number for key, figure in before.items()})
        failed += [f"{name}: {outcome.gate} ({outcome.value:.4g})" for outcome in outcomes if not outcome.passed]
        metrics = {key: figure_record(figure) for key, figure in found.items()}
        if "forget.truth_ratio" in metrics and "forget.quality" not in metrics:
            metrics["forget.quality"] = {"value": None, "n": found["forget.truth_ratio"].n, "interval": None}
        results.append({"path": name, "metrics": metrics, "gates": [gate_record(outcome) for outcome in outcomes]})
    return results, failed


def require_gates(failed: Sequence[str], document: dict[str, object]) -> None:
    """Stop where a gate failed.

    Raises:
        GateError: Carries the document.
    """
    if failed:
        error = GateError(f"{len(failed)} gates failed, first {failed[0]}", "a measured value missed its bound", "")
        error.report = document
        raise error


def first_rows(scores: Mapping[str, SetScores], config: EvaluationConfig) -> dict[str, SetScores]:
    """Return the rows of a log that the protocol reads: the first of forget and retain, all of the others."""
    cut = {"forget", "retain"}
    return {name: found.first(config.rows or 0) if name in cut else found for name, found in scores.items()}


def retained_record(request: EvaluationRequest) -> dict[str, object] | None:
    """Return what `forget.quality` was measured against."""
    if request.retain_log is not None:
        return {"path": request.retain_log, "sha256": file_digest(Path(request.retain_log))}
    return None if request.retain_model is None else {"path": request.retain_model}


def write_log(
    path: str, scores: Mapping[str, SetScores], figures: Mapping[str, Figure], config: EvaluationConfig
) -> None:
    """Write the numbers per row, without a word of any row.

    Raises:
        ResourceError: The file cannot be written.
    """
    from llmsurgery.evaluate.write_log import build_log, encode_log

    rouge = "rougeL_f1" if config.protocol == "muse" else "rougeL_recall"
    origin = {"version": __version__, "evaluation": as_record(config)}
    content = encode_log(build_log(scores, figures, config.min_k, rouge, origin))
    try:
        with Path(path).open("xb") as file:
            file.write(content)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written", str(error), "choose another place for --log") from error
