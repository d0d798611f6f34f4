"""Everything that can be checked before a model is loaded: names, options, data, structure, gates, target."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.arch.adapter import Adapter
from llmsurgery.arch.bundle import plain_config
from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor, Structure, require_text_model
from llmsurgery.checkpoint import FLOAT, Checkpoint, file_digest
from llmsurgery.checkpoint.preflight import check_target
from llmsurgery.checkpoint.target import check_relation
from llmsurgery.data import GENERAL_TEXT
from llmsurgery.data.asked import NOTHING, Asked
from llmsurgery.data.prompts import read_prompts
from llmsurgery.data.records import Row, chosen_rows, read_rows
from llmsurgery.demo import demo_file
from llmsurgery.errors import InputError, UnsupportedError, UsageError
from llmsurgery.evaluate.config import EvaluationConfig, settle
from llmsurgery.evaluate.gates import ROW_NEEDS, Gate, parse_gate, require_data
from llmsurgery.methods.base import Method
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import resolve_config
from llmsurgery.run.choices import NAMES as ASKED
from llmsurgery.run.choices import asked_needs, is_debiasing, read_asked, split_asked
from llmsurgery.run.fitting import check_dtypes, check_quantize, no_quantize, parse_batch_size
from llmsurgery.run.needs import data_digest, offered_needs, row_needs
from llmsurgery.run.pairs import NEED as PAIRS
from llmsurgery.run.pairs import name_needs, pair_needs, requested_pairs, require_figures, wants_pairs
from llmsurgery.run.recover import DATA as RECOVERY
from llmsurgery.run.recover import (
    FLOOR,
    Other,
    check_tokenizers,
    encode_recovery,
    open_others,
    open_source,
    recovery_needs,
)
from llmsurgery.run.request import Request
from llmsurgery.train.config import GuardConfig, TrainingConfig, suitable_lr

if TYPE_CHECKING:
    import torch

    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.concepts import Concept
    from llmsurgery.data.pairs import Pair
    from llmsurgery.evaluate.encode import EvaluationData
    from llmsurgery.evaluate.pictured import PicturedSet
    from llmsurgery.evaluate.recovery import Prompts
    from llmsurgery.evaluate.redirection import Probe

SETS = ("forget", "retain", "holdout", "authors", "facts")
DATA_NAMES = (*SETS, "text", "calibration", "domain", "corpus")
DEMO_DATA = {"calibration": "retain", "domain": "facts"}
"""Data that the demo has under another name: people for the open text, towns for the domain."""
CONTROL = "control"
"""Rows that attacks alone score; no figure is measured on them."""


@dataclass(frozen=True)
class Prepared:
    """A checked request.

    Attributes:
        request: The request.
        method: The method.
        config: Its resolved config.
        evaluation: Resolved evaluation settings.
        checkpoint: The source.
        structure: Its roles.
        targets: Tensors that the method may change.
        files: Data name -> path of the file in use.
        rows: Data name -> rows.
        encoder: Turns rows into token ids.
        data: The method's own prepared data.
        measured: Encoded data of the figures.
        gates: Parsed gates.
        until: Parsed stop rule.
        out: Where the result goes.
        device: Resolved device.
        dtype: Resolved compute dtype.
        hashes: Data name -> SHA-256 of the file that was read.
        retained: Model that never saw the forget rows, or None.
        guard: "self", "none", or "file" with its rows among `rows`.
        guarding: Resolved guard settings.
        pairs: What is redirected where.
        probes: Prompts that tell how far that went.
        concepts: What is removed, where nothing takes its place.
        others: Further models by name.
        prompts: What a recovery is measured on; None for other tasks.
        asked: Everything in the files of --mcq and --contrast.
        given: What the method gets of it.
        pictured: Questions about pictures that are measured, or None.
        pictured_given: Those that the method gets.
        adapter: The adapter that is repaired; `checkpoint` is then its base.
    """

    request: Request
    method: Method
    config: object
    evaluation: EvaluationConfig
    checkpoint: Checkpoint
    structure: Structure
    targets: Sequence[RoleTensor]
    files: Mapping[str, Path]
    rows: Mapping[str, Sequence[Row]]
    encoder: Encoder
    data: object
    measured: EvaluationData
    gates: list[Gate]
    until: Gate | None
    out: Path
    device: torch.device
    dtype: torch.dtype
    hashes: Mapping[str, str]
    retained: Checkpoint | None
    guard: str
    guarding: GuardConfig
    pairs: Sequence[Pair] = ()
    probes: Sequence[Probe] = ()
    concepts: Sequence[Concept] = ()
    others: Mapping[str, Other] = field(default_factory=dict)
    prompts: Prompts | None = None
    asked: Asked = NOTHING
    given: Asked = NOTHING
    pictured: PicturedSet | None = None
    pictured_given: PicturedSet | None = None
    adapter: Adapter | None = None

    @property
    def export(self) -> str:
        """Kind of the result; `--save adapter` makes an adapter of a plain one."""
        return self.method.spec.export_of(self.config)

    @property
    def retain_model(self) -> dict[str, object] | None:
        """The retain model as the manifest names it."""
        if self.retained is None:
            return None
        return {"path": str(self.retained.root), "config_sha256": file_digest(self.retained.root / "config.json")}


def prepare(request: Request) -> Prepared:
    """Check a request and read its data.

    Args:
        request: The request.

    Raises:
        SurgeryError: Whatever is wrong with it, before any long work.
    """
    from llmsurgery.compute.device import resolve_device, resolve_dtype
    from llmsurgery.compute.source import resolve_source
    from llmsurgery.evaluate.encode import encode_domain

    request = dataclasses.replace(request, batch_size=parse_batch_size(request.batch_size))
    method = find_method(request.method, request.task)
    config, evaluation, guarding = split_settings(method, request)
    require_figures(method, evaluation)
    guard = guard_source(method, request)
    files = data_files(method, request)
    if guard not in ("self", "none"):
        files["guard"], guard = Path(guard), "file"
    pairs = requested_pairs(method, config, request, files)
    available = available_needs(method, files, evaluation, request, pairs)
    request = with_budget(request, config)
    gates = [parse_gate(text, available | ROW_NEEDS) for text in request.require]
    if method.spec.models and "harmful" in files and FLOOR not in gates:
        gates.append(FLOOR)
    until = _stop_rule(method, config, request, available)
    if request.out is not None and not request.out.strip():
        raise UsageError("the output is empty", "-o needs the name of a directory", "")
    device = resolve_device(request.device)
    checkpoint, adapter = open_source(method, request.model, request.models)
    if adapter is not None and request.save == "full" and method.spec.export_of(config) == "adapter":
        request = dataclasses.replace(request, save="adapter")
    dtype = resolve_dtype(request.dtype, stored_dtype(checkpoint), device)
    retained = None if request.retain_model is None else Checkpoint.open(resolve_source(request.retain_model))
    structure = detect(checkpoint.config, checkpoint.tensors)
    if method.spec.trains(config):
        config = settle_lr(config, structure, guard != "none", method.spec.lr_scale)
    settle_own = getattr(method, "settle", None)
    config = config if settle_own is None else settle_own(config, structure)
    check_dtypes(method, structure, request.dtype, dtype)
    check_quantize(request.quantize, method, config, structure)
    check_pictures(method, structure)
    targets = method.plan(config, structure)
    if adapter is not None:
        targets = adapter.targets(structure, f"the base {str(checkpoint.root)!r}")
    check_editable(targets)
    others = open_others(method, request, structure, targets, checkpoint)
    out = Path(request.out) if request.out is not None else generated_name(request)
    if not request.dry_run:
        check_target(checkpoint, out, request.force, request.resume)
        check_report(out, request.force)
        if adapter is not None:
            check_relation(adapter.root, [adapter.header.path], out)
    rows = read_sets({name: path for name, path in files.items() if name not in (PAIRS, *ASKED)})
    in_domain = hold_back(rows, files, evaluation)
    asked = read_asked(files, method.spec.pictures)
    given, asked_about = split_asked(asked, method, config, request.seed)
    met = available | row_needs(rows, evaluation) | name_needs(pairs, rows, evaluation) | asked_needs(asked)
    for gate in gates:
        require_data(gate, met)
    hashes = {name: data_digest(path, rows.get(name, ())) for name, path in files.items()}
    encoder = make_encoder(checkpoint)
    check_tokenizers(others, encoder)
    data = method.prepare(config, encoder, rows)
    if is_debiasing(method):
        cast(Any, method).check_asked(config, encoder, given)
    figured = rows if evaluation.figures != "edit" else {}
    measured = encode_for_figures(encoder, figured, evaluation, config, asked_about)
    measured.domain.extend(encode_domain(encoder, in_domain, evaluation) if in_domain else [])
    probes = encode_pairs(method, config, encoder, pairs)
    concepts: list[Concept] = cast(Any, method).concepts(config, encoder, pairs) if method.spec.targetless else []
    contexts = [context.encoded for probe in probes for context in (probe.source, probe.target)]
    prompts = encode_recovery(encoder, rows) if method.spec.models else None
    if prompts is not None:
        contexts += [*prompts.harmful, *prompts.harmless, *prompts.task]
    require_known_tokens(measured, structure, contexts)
    pictured = encode_pictures(checkpoint, encoder, asked_about)
    pictured_given = encode_pictures(checkpoint, encoder, given)
    return Prepared(
        request, method, config, evaluation, checkpoint, structure, targets, files, rows, encoder, data, measured,
        gates, until, out, device, dtype, hashes, retained, guard, guarding, pairs, probes, concepts, others,
        prompts, asked, given, pictured, pictured_given, adapter,
    )  # fmt: skip


def with_budget(request: Request, config: object) -> Request:
    """Return a request with the gate that a method's own `kl_budget` stands for."""
    budget = getattr(config, "kl_budget", None)
    gate = None if budget is None else f"utility.kl<={budget:g}"
    if gate is None or gate in request.require:
        return request
    return dataclasses.replace(request, require=(*request.require, gate))


def available_needs(
    method: Method,
    files: Mapping[str, Path],
    evaluation: EvaluationConfig,
    request: Request,
    pairs: Sequence[Pair],
) -> set[str]:
    """Return the needs of metrics that are met, those that the rows themselves meet left out."""
    if evaluation.figures == "edit":
        return pair_needs(method, pairs)
    given = {name for name in (*DATA_NAMES, *ASKED) if name in files} | {"whole"}
    given |= {"letters"} if "mcq" in files else set()
    if method.spec.pictures:
        given = given - {"mcq", "letters"} | {"pictures"}
    given |= recovery_needs(files, bool(request.judge)) if method.spec.models else set()
    if method.spec.task == "remove-layernorm":
        given |= {"loss", "norms"}
    if method.spec.task == "prune":
        given.add("loss")
        timed = method.spec.structured and evaluation.figures == "all"
        given |= {"pruning", "structured"} if timed else {"pruning"}
    return given | offered_needs(evaluation, bool(request.retain_model)) | pair_needs(method, pairs)


def check_pictures(method: Method, structure: Structure) -> None:
    """Refuse a model that sees pictures, of a method that is for text models.

    Raises:
        UnsupportedError: It is one.
    """
    if not method.spec.pictures:
        require_text_model(structure, method.spec.name)


def encode_pictures(checkpoint: Checkpoint, encoder: Encoder, asked: Asked) -> PicturedSet | None:
    """Return questions about pictures as prompts, None without any."""
    if asked.pictured is None:
        return None
    from llmsurgery.compute.load import load_processor
    from llmsurgery.evaluate.pictured import encode_pictured

    return encode_pictured(load_processor(checkpoint.root), encoder, asked.pictured)


def check_editable(targets: Sequence[RoleTensor]) -> None:
    """Refuse tensors whose stored dtype cannot be edited.

    Raises:
        UnsupportedError: Names the first.
    """
    if other := [target for target in targets if target.dtype not in FLOAT]:
        raise UnsupportedError(
            f"tensor {other[0].stored} is stored as {other[0].dtype}",
            f"only {', '.join(sorted(FLOAT))} weights can be edited",
            "",
        )


def encode_pairs(method: Method, config: object, encoder: Encoder, pairs: Sequence[Pair]) -> list[Probe]:
    """Let the method check the pairs, and return the prompts that they are measured on."""
    if not pairs or method.spec.targetless:
        return []
    from llmsurgery.evaluate.redirection import make_probes

    check = getattr(method, "check_pairs", None)
    if check is not None:
        check(config, encoder, pairs)
    return make_probes(encoder, pairs)


def read_sets(files: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Read the data files; of a preference pair the rejected answer is to be forgotten, the chosen one to be kept."""
    rows = {
        name: read_prompts(path) if name in ("harmful", "harmless") else read_rows(path) for name, path in files.items()
    }
    return {name: members if name == "forget" else chosen_rows(members) for name, members in rows.items()}


def hold_back(rows: dict[str, list[Row]], files: Mapping[str, Path], evaluation: EvaluationConfig) -> list[Row]:
    """Take out of the rows that a method reads what figures are measured on; return those of the domain.

    The last fifth of --domain is measured, `text_rows` rows at most. The shipped text serves as --calibration behind
    the passages of it that are measured.
    """
    if files.get("calibration") == files["text"] == GENERAL_TEXT:
        rows["calibration"] = rows["calibration"][evaluation.text_rows :] or rows["calibration"]
    domain = rows.get("domain", [])
    count = min(evaluation.text_rows, len(domain) // 5)
    if count:
        rows["domain"] = domain[:-count]
    return domain[-count:] if count else list(domain)


def split_settings(method: Method, request: Request) -> tuple[object, EvaluationConfig, GuardConfig]:
    """Resolve the method's hyperparameters and, by their prefixes `eval.` and `guard.`, the other settings."""
    own, shared, guarding = _by_prefix(request.settings)
    if isinstance(request.batch_size, int):
        shared.setdefault("batch_size", request.batch_size)
    if request.model is None:
        own = {**method.spec.demo_settings, **own}
    config = resolve_config(method.config_type, own, method.spec.presets)
    evaluation = settle(resolve_config(EvaluationConfig, shared))
    if method.spec.models and evaluation.scorer is None:
        evaluation = dataclasses.replace(evaluation, scorer=str(getattr(config, "scorer", "probability")))
    guard: GuardConfig = resolve_config(GuardConfig, guarding)
    return config, evaluation, guard


def _by_prefix(settings: Mapping[str, object]) -> list[dict[str, object]]:
    result: list[dict[str, object]] = [{}, {}, {}]
    for name, value in settings.items():
        prefix, dot, rest = name.partition(".")
        place = {"eval": 1, "guard": 2}.get(prefix, 0) if dot else 0
        result[place][rest if place else name] = value
    return result


def guard_source(method: Method, request: Request) -> str:
    """Return "self", "none" or the file that the guard is made from.

    Raises:
        UsageError: A guard was asked for of a method that does not train, or makes nothing forgotten.
    """
    if (why := unwatched(method)) is not None:
        if request.guard not in (None, "none"):
            raise UsageError(f"{method.spec.name} has no --guard", why, "drop --guard")
        return "none"
    # A preset reproduces a paper, which knows no guard.
    paper = request.settings.get("preset") not in (None, "toolkit")
    return request.guard or ("none" if paper else "self")


def settle_lr(config: object, structure: Structure, guarded: bool, scale: float = 1.0) -> object:
    """Fill in the step size of a trained method that was left to the toolkit, so that the manifest names it."""
    training = getattr(config, "training", None)
    if not isinstance(training, TrainingConfig) or training.lr is not None:
        return config
    width = next(tensor.shape[-1] for tensor in structure.tensors if tensor.role == "embed")
    lr = float(f"{scale * suitable_lr(width, training.train, guarded):.2g}")
    settled = dataclasses.replace(training, lr=lr)
    return dataclasses.replace(cast(Any, config), training=settled)


def data_files(method: Method, request: Request) -> dict[str, Path]:
    """Return the data files in use: those given, then the demo's or the shipped text.

    Raises:
        UsageError: Data that the method needs is not given.
    """
    files = {name: Path(path) for name, path in request.data.items()}
    if request.model is None:
        # What becomes of a name shows in questions about it.
        asked = ("forget",) if wants_pairs(method) else ()
        kept = () if is_debiasing(method) or method.spec.task == "remove-layernorm" else ("retain",)
        usual = RECOVERY if method.spec.models else kept
        for name in (*method.spec.needs, *method.spec.uses, *asked, *usual, "text"):
            files.setdefault(name, demo_file(method.spec.demo, f"{DEMO_DATA.get(name, name)}.jsonl"))
    for name in method.spec.needs:
        if name == PAIRS and request.concepts is not None:
            # Two texts in place of the file, also in place of the demo's.
            if PAIRS not in request.data:
                files.pop(PAIRS, None)
        elif name not in files:
            if name == PAIRS:
                raise UsageError(
                    "--from is missing" if method.spec.targetless else "--from and --to are missing",
                    f"{method.spec.name} has to know the concept",
                    f"give --from TEXT{'' if method.spec.targetless else ' --to TEXT'}, or --pairs FILE; "
                    "or no MODEL to see the demo",
                )
            raise UsageError(
                f"--{name} is missing",
                f"{method.spec.name} needs {', '.join(f'--{need}' for need in method.spec.needs)}",
                f"give --{name} FILE, or no MODEL to see the demo",
            )
    files.setdefault("text", GENERAL_TEXT)
    if "calibration" in method.spec.uses:
        files.setdefault("calibration", GENERAL_TEXT)
    return files


def unwatched(method: Method) -> str | None:
    """Return why a method has neither guard nor stop rule, None if it has."""
    if not (method.spec.trained or method.spec.recovers):
        return "it does not train"
    return None if "forget" in method.spec.needs else "nothing is to be forgotten"


def check_untrained(method: Method, request: Request) -> None:
    """Refuse options that only training has, of a method that does not train.

    Raises:
        UsageError: One was given.
    """
    guard_source(method, request)
    if (why := unwatched(method)) is not None and request.until not in (None, "none"):
        raise UsageError(f"{method.spec.name} has no --until", why, "drop --until")
    if method.spec.trained:
        return
    if request.until is not None and not method.spec.recovers:
        raise UsageError(f"{method.spec.name} has no --until", "it does not train", "drop --until")
    if request.quantize != "none":
        raise no_quantize(method)


def _stop_rule(method: Method, config: object, request: Request, available: set[str]) -> Gate | None:
    check_untrained(method, request)
    if request.until == "none":
        return None
    if (kind := method.spec.export_of(config)) != "plain":
        if request.until is not None:
            raise UsageError(
                f"a {kind} of {method.spec.name} has no --until", "the model itself is not trained", "drop --until"
            )
        return None
    paper = request.settings.get("preset") not in (None, "toolkit")
    text = request.until or (None if paper else method.spec.until)
    if text is None:
        return None
    rule = parse_gate(text, available)
    if rule.metric not in {"forget.token_prob", "forget.prob"}:
        raise UsageError(
            f"--until cannot watch {rule.metric}",
            "during training only forget.token_prob and forget.prob are measured",
            "use one of these, or --require for a gate at the end",
        )
    return rule


def generated_name(request: Request) -> Path:
    """Return a free name below `llmsurgery-out`: task and method, then -002, -003, ...

    With `resume` it is the first name that an interrupted run left unfinished, if there is one.
    """
    folder = Path("llmsurgery-out")
    stem = f"{request.task}-{request.method}"
    unfinished: Path | None = None
    number = 1
    while True:
        place = folder / (stem if number == 1 else f"{stem}-{number:03d}")
        partial = place.with_name(f"{place.name}.partial")
        taken = (place, partial, place.with_name(f"{place.name}.report.json"))
        if not any(path.exists() or path.is_symlink() for path in taken):
            return unfinished if request.resume and unfinished is not None else place
        if unfinished is None and partial.is_dir() and not place.exists():
            unfinished = place
        number += 1


def make_encoder(checkpoint: Checkpoint) -> Encoder:
    """Load the tokenizer of a checkpoint with the model's own bound on length."""
    from llmsurgery.compute.load import load_tokenizer
    from llmsurgery.data.chat import Encoder

    config = plain_config(checkpoint.config)
    inner = config.get("text_config")
    config = inner if isinstance(inner, Mapping) else config
    lengths = [config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx")]
    known = [length for length in lengths if isinstance(length, int) and length > 0]
    return Encoder(load_tokenizer(checkpoint.root), min(known, default=2048))


def encode_for_figures(
    encoder: Encoder,
    rows: Mapping[str, Sequence[Row]],
    evaluation: EvaluationConfig,
    config: object = None,
    asked: Asked | None = None,
) -> EvaluationData:
    """Encode the data sets that figures are measured on; plain text is cut as the method's config cuts it."""
    from llmsurgery.data.chat import CHUNK_TOKENS
    from llmsurgery.data.mcq import first_questions, read_template
    from llmsurgery.evaluate.encode import encode_data
    from llmsurgery.evaluate.letters import encode_letters
    from llmsurgery.evaluate.listings import encode_listings
    from llmsurgery.evaluate.stereotypes import encode_stereotypes

    training = getattr(config, "training", None)
    chunk = min(CHUNK_TOKENS, training.max_length) if isinstance(training, TrainingConfig) else CHUNK_TOKENS
    sets = {name: list(rows[name]) for name in (*SETS, CONTROL) if name in rows}
    data = encode_data(encoder, sets, list(rows.get("text", ())), evaluation, chunk)
    if asked is None:
        return data
    letters = listings = None
    if asked.choices is not None:
        template = read_template(evaluation.mcq_template or str(getattr(config, "template", "")))
        choices = first_questions(asked.choices, evaluation.mcq_rows)
        letters = encode_letters(encoder, choices, template)
        if evaluation.position_invariant:
            listings = encode_listings(encoder, choices, template, letters.tokens)
    pairs = encode_stereotypes(encoder, asked.contrast)
    return dataclasses.replace(data, letters=letters, listings=listings, stereotypes=pairs)


def require_known_tokens(data: EvaluationData, structure: Structure, others: Sequence[Encoded] = ()) -> None:
    """Refuse a tokenizer that has ids beyond the model's embedding.

    Raises:
        InputError: Names the id and the number of embeddings.
    """
    encoded = [*others, *data.texts, *data.domain, *(row for rows in data.encoded.values() for row in rows)]
    encoded += [row for sets in data.wrong.values() for rows in sets.values() for row in rows]
    encoded += [row for sets in data.paraphrased.values() for row in sets.values()]
    encoded += [row for rows in data.whole.values() for row in rows]
    encoded += data.letters.prompts if data.letters else []
    encoded += data.stereotypes.encoded if data.stereotypes else []
    require_embedded(encoded, structure)


def require_embedded(encoded: Sequence[Encoded], structure: Structure) -> None:
    """Refuse token ids beyond the model's embedding.

    Raises:
        InputError: Names the id and the number of embeddings.
    """
    embeddings = next(tensor.shape[0] for tensor in structure.tensors if tensor.role == "embed")
    highest = max((max(row.ids) for row in encoded), default=0)
    if highest >= embeddings:
        raise InputError(
            f"the tokenizer gives token id {highest}, the model has {embeddings} embeddings",
            "tokenizer and weights are not from the same model",
            "copy the right tokenizer beside the weights",
        )


def report_path(out: Path) -> Path:
    """Return where the manifest of a failed gate is left."""
    return out.with_name(out.name + ".report.json")


def page_path(out: Path) -> Path:
    """Return where the page of a failed gate is left."""
    return out.with_name(out.name + ".report.html")


def check_report(out: Path, force: bool) -> None:
    """Refuse to replace a report that is there already.

    Raises:
        UsageError: There is one, and no --force.
    """
    for report in (report_path(out), page_path(out)):
        if not force and report.exists():
            raise UsageError(
                f"{str(report)!r} exists",
                "it is where the report would go if a gate failed",
                "remove it, choose another output with -o, or give --force",
            )


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype code that most parameters are stored in."""
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        counts[info.dtype] += info.size
    return counts.most_common(1)[0][0]
