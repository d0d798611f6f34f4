"""`audit`: scores of preference or fine-tuning data, read with a model's help; no weight changes."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmsurgery import __version__
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, file_digest
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row, read_records, read_rows
from llmsurgery.errors import InputError, UsageError, unknown_name
from llmsurgery.run.audit_bci import audit_bci
from llmsurgery.run.audit_ches import audit_ches
from llmsurgery.run.encoding import make_encoder
from llmsurgery.run.files import data_digest
from llmsurgery.run.manifest import FORMAT
from llmsurgery.run.notices import Notices

PAPERS = {
    "ches": "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization, arXiv 2410.08847",
    "bci": "TraceAlign - Tracing the Drift: Attributing Alignment Failures to Training-Time Belief Sources in LLMs, "
    "arXiv 2508.02063",
}
SCORES = ("ln_ches", "ches")
OWN = {"ches": ("keep", "score", "end"), "bci": ("reference", "window", "tau", "most_found", "every")}
"""The settings that only one audit has."""


@dataclass(frozen=True)
class AuditRequest:
    """What `audit` is asked for; see `llmsurgery.api.audit`."""

    kind: str
    data: str
    model: str
    keep: float = 0.05
    score: str = "ln_ches"
    end: bool = True
    reference: str | None = None
    window: int = 8
    tau: float = 20.0
    most_found: int = 3
    every: bool = False
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8
    trust_remote_code: bool = False

    @property
    def settings(self) -> dict[str, object]:
        """The settings of this kind of audit."""
        return {name: getattr(self, name) for name in OWN[self.kind] if name != "reference"}


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        document: The manifest, without `out` and `files`.
        scores: One row per row of the data, numbers only.
        kept: Numbers of the rows that pass the filter, in the order of the file.
        records: The rows as they stand in the file.
        series: Name -> scores of the picture, None where a row has none.
        limit: The score that divides what is kept from the rest; None where nothing does.
    """

    document: dict[str, object]
    scores: Sequence[Mapping[str, object]]
    kept: Sequence[int]
    records: Sequence[object] = field(repr=False)
    series: Mapping[str, Sequence[float | None]]
    limit: float | None


def audit_data(request: AuditRequest, progress: Progress) -> Audit:
    """Score a data file; see `llmsurgery.api.audit`.

    Raises:
        SurgeryError: Whatever is wrong with the request, the data or the model.
    """
    import torch
    import transformers

    from llmsurgery.compute.device import peak_memory

    started = time.perf_counter()
    _check(request)
    notices = Notices(progress)
    rows = read_rows(request.data)
    references = [] if request.reference is None else read_rows(request.reference)
    if request.kind == "ches" and (single := [row for row in rows if row.preferred is None]):
        raise InputError(
            f"{single[0].where} is no preference pair",
            f"{len(single)} of {len(rows)} rows have one answer; CHES compares two",
            "give records with chosen and rejected, or use `audit bci`",
        )
    checkpoint = Checkpoint.open(resolve_source(request.model))
    encoder = make_encoder(checkpoint)
    if request.kind == "ches":
        found = audit_ches(request, rows, checkpoint, encoder, notices)
    else:
        found = audit_bci(request, rows, references, _vocabulary(checkpoint, encoder), encoder, notices)
    scores, kept, record, series, limit = found
    document: dict[str, object] = {
        "format": FORMAT,
        "versions": {
            "llmsurgery": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "source": {
            "path": str(checkpoint.root),
            "given": request.model,
            "config_sha256": file_digest(checkpoint.root / "config.json"),
        },
        "operations": [
            {
                "task": "audit",
                "method": request.kind,
                "paper": PAPERS[request.kind],
                "settings": request.settings,
                "record": {"rows": len(rows), "kept": len(kept), "dropped": len(rows) - len(kept), **record},
            }
        ],
        "data": _data_records(request, rows, references),
        "export": "none",
        "metrics": {},
        "gates": [],
        "notices": notices.messages,
        "cost": {"seconds": round(time.perf_counter() - started, 3), **peak_memory()},
    }
    records = [record for _, record in read_records(request.data)]
    return Audit(document, scores, kept, records, series, limit)


def _check(request: AuditRequest) -> None:
    if request.kind not in PAPERS:
        raise unknown_name("audit", request.kind, tuple(PAPERS), "audit takes ches or bci")
    if request.score not in SCORES:
        raise unknown_name("score", request.score, SCORES, "--score takes ln_ches or ches")
    if not 0 < request.keep <= 1:
        raise UsageError(f"--keep {request.keep} is no share", "it is above 0 and at most 1", "--keep 0.05")
    if request.window < 1 or request.tau <= 0 or request.most_found < 0 or request.batch_size < 1:
        raise UsageError("a number is out of bounds", "window and batch size >= 1, tau > 0, most-found >= 0", "")
    if request.kind == "bci" and request.reference is None:
        raise UsageError(
            "--reference is missing",
            "how improbable a token is, is counted in a corpus",
            "give --reference FILE, such as a part of the training text; the data itself shows what is rare within it",
        )
    defaults = {item.name: item.default for item in dataclasses.fields(request)}
    foreign = [name for kind, names in OWN.items() if kind != request.kind for name in names]
    if wrong := [name for name in foreign if getattr(request, name) != defaults[name]]:
        raise UsageError(
            f"audit {request.kind} has no {wrong[0]}", "it is a setting of the other audit", "leave it out"
        )


def _vocabulary(checkpoint: Checkpoint, encoder: Encoder) -> int:
    """Return the number of token ids: that of the embeddings, or of a tokenizer that has more."""
    structure = detect(checkpoint.config, checkpoint.tensors)
    embeddings = next(tensor.shape[0] for tensor in structure.tensors if tensor.role == "embed")
    return max(embeddings, len(encoder.tokenizer))


def _data_records(
    request: AuditRequest, rows: Sequence[Row], references: Sequence[Row]
) -> dict[str, dict[str, object]]:  # fmt: skip
    given = {"data": (request.data, rows)}
    if request.reference is not None:
        given["reference"] = (request.reference, references)
    return {
        name: {"path": path, "sha256": data_digest(Path(path), members), "rows": len(members)}
        for name, (path, members) in given.items()
    }
