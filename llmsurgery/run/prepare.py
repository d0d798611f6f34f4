"""Everything that can be checked before a model is loaded: names, options, data, structure, gates, target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.arch.adapter import Adapter
from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import Checkpoint, file_digest
from llmsurgery.checkpoint.preflight import check_target
from llmsurgery.checkpoint.target import check_relation
from llmsurgery.data.asked import NOTHING, Asked
from llmsurgery.data.records import Row
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.gates import ROW_NEEDS, Gate, parse_gate, require_data
from llmsurgery.methods.base import Method
from llmsurgery.methods.registry import find_method
from llmsurgery.run.choices import NAMES as ASKED
from llmsurgery.run.choices import asked_needs, read_asked, split_asked
from llmsurgery.run.encoding import (
    encode_for_figures,
    encode_pairs,
    encode_pictures,
    make_encoder,
    require_known_tokens,
)
from llmsurgery.run.files import data_digest, data_files, hold_back, read_sets
from llmsurgery.run.fitting import check_dtypes, check_quantize, parse_batch_size
from llmsurgery.run.needs import available_needs, row_needs
from llmsurgery.run.pairs import NEED as PAIRS
from llmsurgery.run.pairs import name_needs, requested_pairs, require_figures
from llmsurgery.run.places import check_report, generated_name
from llmsurgery.run.recover import (
    FLOOR,
    Other,
    check_tokenizers,
    encode_recovery,
    open_others,
    open_source,
)
from llmsurgery.run.request import Request
from llmsurgery.run.settings import guard_source, settle_model, split_settings, stop_rule, with_budget
from llmsurgery.run.source import check_editable, check_pictures, stored_dtype
from llmsurgery.train.config import GuardConfig

if TYPE_CHECKING:
    import torch

    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.concepts import Concept
    from llmsurgery.data.pairs import Pair
    from llmsurgery.evaluate.encode import EvaluationData
    from llmsurgery.evaluate.pictured import PicturedSet
    from llmsurgery.evaluate.recovery import Prompts
    from llmsurgery.evaluate.redirection import Probe


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


@dataclass(frozen=True)
class _Options:
    """What a request says before anything but its pairs is read; attributes as in `Prepared`.

    `available` are the needs of metrics that are met, those left out that only rows can meet.
    """

    request: Request
    method: Method
    config: object
    evaluation: EvaluationConfig
    guarding: GuardConfig
    guard: str
    files: Mapping[str, Path]
    pairs: Sequence[Pair]
    available: set[str]
    gates: list[Gate]
    until: Gate | None
    device: torch.device


@dataclass(frozen=True)
class _Source:
    """What the headers of the models say, and what is settled by them; attributes as in `Prepared`."""

    request: Request
    config: object
    checkpoint: Checkpoint
    adapter: Adapter | None
    dtype: torch.dtype
    retained: Checkpoint | None
    structure: Structure
    targets: Sequence[RoleTensor]
    others: Mapping[str, Other]
    out: Path


def prepare(request: Request) -> Prepared:
    """Check a request and read its data.

    Args:
        request: The request.

    Raises:
        SurgeryError: Whatever is wrong with it, before any long work.
    """
    options = _check_options(request)
    return _read_data(options, _open_models(options))


def _check_options(request: Request) -> _Options:
    """Check what the request says by itself: names, settings, gates."""
    from llmsurgery.compute.device import resolve_device

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
    until = stop_rule(method, config, request, available)
    if request.out is not None and not request.out.strip():
        raise UsageError("the output is empty", "-o needs the name of a directory", "")
    device = resolve_device(request.device)
    return _Options(
        request, method, config, evaluation, guarding, guard, files, pairs, available, gates, until, device
    )  # fmt: skip


def _open_models(options: _Options) -> _Source:
    """Open the source and the models beside it, check their headers, and see that the result has a place."""
    from llmsurgery.compute.device import resolve_dtype
    from llmsurgery.compute.source import resolve_source

    request, method, config = options.request, options.method, options.config
    checkpoint, adapter = open_source(method, request.model, request.models)
    if adapter is not None and request.save == "full" and method.spec.export_of(config) == "adapter":
        request = dataclasses.replace(request, save="adapter")
    dtype = resolve_dtype(request.dtype, stored_dtype(checkpoint), options.device)
    retained = None if request.retain_model is None else Checkpoint.open(resolve_source(request.retain_model))
    structure = detect(checkpoint.config, checkpoint.tensors)
    config = settle_model(method, config, structure, options.guard != "none")
    check_dtypes(method, structure, request.dtype, dtype)
    check_quantize(request.quantize, config, structure)
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
    return _Source(request, config, checkpoint, adapter, dtype, retained, structure, targets, others, out)


def _read_data(options: _Options, source: _Source) -> Prepared:
    """Read and encode the data, and let the method check it."""
    from llmsurgery.evaluate.encode import encode_domain

    method, evaluation, files, pairs = options.method, options.evaluation, options.files, options.pairs
    request, config, structure = source.request, source.config, source.structure
    rows = read_sets({name: path for name, path in files.items() if name not in (PAIRS, *ASKED)})
    in_domain = hold_back(rows, files, evaluation)
    asked = read_asked(files, method.spec.pictures)
    given, asked_about = split_asked(asked, method, config, request.seed)
    met = row_needs(rows, evaluation) | name_needs(pairs, rows, evaluation) | asked_needs(asked)
    for gate in options.gates:
        require_data(gate, options.available | met)
    hashes = {name: data_digest(path, rows.get(name, ())) for name, path in files.items()}
    encoder = make_encoder(source.checkpoint)
    check_tokenizers(source.others, encoder)
    data = method.prepare(config, encoder, rows)
    check_asked = getattr(method, "check_asked", None)
    if check_asked is not None:
        check_asked(config, encoder, given)
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
    pictured = encode_pictures(source.checkpoint, encoder, asked_about)
    pictured_given = encode_pictures(source.checkpoint, encoder, given)
    return Prepared(
        request, method, config, evaluation, source.checkpoint, structure, source.targets, files, rows, encoder, data,
        measured, options.gates, options.until, source.out, options.device, source.dtype, hashes, source.retained,
        options.guard, options.guarding, pairs, probes, concepts, source.others, prompts, asked, given, pictured,
        pictured_given, source.adapter,
    )  # fmt: skip
