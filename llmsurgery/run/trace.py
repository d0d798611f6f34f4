"""`trace`: where in a model a fact is recalled, measured and written down; nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.arch.bundle import is_bundle
from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import require_text_model
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.data.records import Row, read_rows
from llmsurgery.errors import InputError, UnsupportedError, UsageError
from llmsurgery.run.encoding import make_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.compute.traces import Fact, Trace
    from llmsurgery.data.chat import Encoder

TOKENS = ("all", "subject")


@dataclass(frozen=True)
class TraceRequest:
    """What `trace` is asked for; see `llmsurgery.api.trace`."""

    model: str
    prompt: str | None
    subject: str | None
    answer: str | None
    data: str | None
    rows: int
    kinds: tuple[str, ...]
    tokens: str
    window: int
    noise: float
    samples: int
    seed: int
    device: str
    dtype: str
    batch_size: int
    trust_remote_code: bool


def trace_model(request: TraceRequest, progress: Progress) -> dict[str, object]:
    """Trace one prompt or the rows of a file; see `llmsurgery.api.trace` for the result."""
    from llmsurgery.compute.device import memory_errors, resolve_device, resolve_dtype, suitable_threads
    from llmsurgery.compute.load import load_model
    from llmsurgery.compute.tracing import trace_facts

    _check(request)
    rows = read_rows(request.data)[: request.rows or None] if request.data is not None else []
    checkpoint = Checkpoint.open(resolve_source(request.model))
    if is_bundle(checkpoint.config):
        raise UnsupportedError(
            f"{str(checkpoint.root)!r} is a bundle with model code of its own",
            "a trace puts states of a stock model back",
            "trace the model before surgery, whose weights it holds, or a plain form of the result",
        )
    structure = detect(checkpoint.config, checkpoint.tensors)
    require_text_model(structure, "trace")
    encoder = make_encoder(checkpoint)
    facts, unnamed = _facts_of(encoder, rows)
    device = resolve_device(request.device)
    # Differences of a hundredth matter here; half precision is used only on demand.
    dtype = resolve_dtype("float32" if request.dtype == "auto" else request.dtype, "F32", device)
    parameters = sum(info.size for info in checkpoint.tensors.values())
    with memory_errors(), suitable_threads(parameters, device):
        model = load_model(checkpoint.root, dtype, device, request.trust_remote_code, structure.family.buffers)
        if request.prompt is not None:
            facts = [_prompt_fact(model, encoder, request)]
        trace = trace_facts(
            model,
            structure,
            facts,
            progress,
            request.kinds,
            request.samples,
            request.noise,
            request.window,
            request.seed,
            request.batch_size,
            request.tokens == "subject",
        )
    if not trace.facts:
        raise InputError(
            "the model knows none of the facts" if request.data else "the model gives another answer first",
            f"the first token of its answer is never its first choice ({trace.skipped} of {trace.skipped} skipped)",
            "trace facts that the model knows, or leave out --answer",
        )
    if trace.weak:
        progress.notice("the noise leaves most of the answer: effects mean little; raise --noise")
    return _record(str(checkpoint.root), trace, unnamed, structure.layers)


def _check(request: TraceRequest) -> None:
    if (request.prompt is None) == (request.data is None):
        raise UsageError("give --prompt or --data", "a trace needs one prompt or a file of them", "")
    if request.prompt is not None and (request.subject is None or request.subject not in request.prompt):
        raise UsageError(
            "--subject must stand in --prompt",
            "it names the words whose embeddings are blurred",
            '--prompt "The Eiffel Tower is in" --subject "The Eiffel Tower"',
        )
    if request.prompt is not None and not (request.subject or "").strip():
        raise UsageError("--subject is empty", "it names the words whose embeddings are blurred", "")
    if request.data is not None and (request.subject is not None or request.answer is not None):
        raise UsageError("--subject and --answer go with --prompt", "rows bring their own", "drop them")
    if request.tokens not in TOKENS:
        raise UsageError(f"unknown tokens {request.tokens!r}", f"choose {' or '.join(TOKENS)}", "")
    if not request.kinds:
        raise UsageError("no kind is chosen", "there is nothing to restore", "--kind mlp")
    if request.samples < 1 or request.noise < 0 or request.window < 0 or request.batch_size < 1:
        raise UsageError("a number is out of bounds", "samples and batch size >= 1, noise and window >= 0", "")


def _facts_of(encoder: Encoder, rows: Sequence[Row]) -> tuple[list[Fact], int]:
    from llmsurgery.data.subjects import make_facts

    facts, unnamed = make_facts(encoder, rows)
    if rows and not facts:
        raise InputError(
            f"none of {len(rows)} rows has a subject",
            "a row's subject is its key `subject`, or the names in its question",
            "add the key `subject` to the rows",
        )
    return facts, unnamed


def _prompt_fact(model: PreTrainedModel, encoder: Encoder, request: TraceRequest) -> Fact:
    import torch

    from llmsurgery.data.subjects import make_fact, prompt_fact

    prompt, subject = request.prompt or "", request.subject or ""
    if request.answer is not None:
        blank = "" if prompt[-1:].isspace() or request.answer[:1].isspace() else " "
        row = Row("completion", prompt, blank + request.answer, where="--prompt", subject=subject)
        fact = make_fact(encoder, row, whole_answer=True)
    else:
        ids = encoder.encode_text(prompt, encoder.max_length - 1).ids
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
        fact = prompt_fact(encoder, prompt, subject, int(logits[0, -1].argmax()))
    if fact is None:
        raise InputError("the subject has no token of its own", "it runs into the answer's first token", "")
    from dataclasses import replace

    text = encoder.tokenizer.decode(fact.ids[fact.answer_start :])
    return replace(fact, where=str(text))


def _record(path: str, trace: Trace, unnamed: int, layers: int) -> dict[str, object]:
    from llmsurgery.compute.traces import LAST_SUBJECT_TOKEN, strong_layers

    kinds = trace.facts[0].restored
    groups = {kind: trace.by_group(kind) for kind in kinds}
    document: dict[str, object] = {
        "path": path,
        "layers": layers,
        "facts": {"traced": len(trace.facts), "not_known": trace.skipped, "without_subject": unnamed},
        "clean": trace.clean,
        "corrupted": trace.corrupted,
        "total_effect": trace.clean - trace.corrupted,
        "noise": {
            "sigma": trace.sigma,
            "multiplier": trace.multiplier,
            "level": trace.sigma * trace.multiplier,
            "samples": trace.samples,
            "seed": trace.seed,
            "too_weak": trace.weak,
        },
        "window": trace.window,
        "groups": {kind: {name: row.tolist() for name, row in rows.items()} for kind, rows in groups.items()},
        "strong_layers": {kind: list(strong_layers(rows[LAST_SUBJECT_TOKEN])) for kind, rows in groups.items()},
    }
    if len(trace.facts) == 1:
        one = trace.facts[0]
        document["answer"] = one.fact.where
        document["tokens"] = [{"text": unit.label, "group": unit.group or None} for unit in one.fact.units]
        document["effects"] = {kind: one.effects(kind).tolist() for kind in kinds}
    return document
