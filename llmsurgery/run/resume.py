"""Go on from what a killed or failed run left: whose state it is, and when it is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.target import Claim, remove, sync_directory
from llmsurgery.compute.progress import Progress
from llmsurgery.errors import DivergedError, ResourceError, SurgeryError, UsageError
from llmsurgery.methods.settings import as_record
from llmsurgery.run.fitting import bitsandbytes_version

if TYPE_CHECKING:
    from llmsurgery.run.prepare import Prepared
    from llmsurgery.train.state import StateStore

_NAME = "run.json"
MAY_DIFFER = ("lr", "clip")
"""Settings that may change when a run goes on: after a divergence nothing else would help."""


@contextmanager
def resumable(prepared: Prepared, progress: Progress) -> Iterator[tuple[Claim, StateStore]]:
    """Hold the place of the output for a run, and decide what stays there when the run fails.

    A state stays after a kill, an interruption, a full disk, exhausted memory, a divergence or a bug; after any other
    failure (a failed gate, no effect) going on would end in the same failure, and it is removed.

    Args:
        prepared: The checked request.
        progress: Told of a kept or found state.

    Yields:
        The place, and the store of training states in it.

    Raises:
        UsageError: The state found there is of another run.
    """
    from llmsurgery.train.state import StateStore

    request = prepared.request
    claim = Claim(prepared.out, request.force and not request.resume, request.resume)
    store = StateStore(claim.state)
    try:
        _match(claim.state, identity(prepared))
    except BaseException:
        # What is there belongs to another run.
        claim.release()
        raise
    try:
        if steps := store.steps():
            progress.notice(f"going on from step {steps}")
        yield claim, store
    except BaseException as error:
        if not claim.held:
            raise
        if not _worth_keeping(error) or not (steps := store.steps()):
            claim.discard()
            raise
        claim.clear()
        claim.release()
        advice = f"the state of step {steps} is kept in {claim.path}; --resume goes on from it"
        if isinstance(error, DivergedError):
            advice += ", with a lower --set lr=... if you like"
        if isinstance(error, SurgeryError):
            error.fix = f"{error.fix}; {advice}" if error.fix else advice
        else:
            progress.notice(advice)
        raise


def _worth_keeping(error: BaseException) -> bool:
    return isinstance(error, DivergedError | ResourceError) or not isinstance(error, SurgeryError)


def identity(prepared: Prepared) -> dict[str, object]:
    """Return what decides the bytes of a result, as JSON values."""
    from importlib.metadata import version

    import torch
    import transformers

    request = prepared.request
    settings = {name: value for name, value in as_record(prepared.config).items() if name not in MAY_DIFFER}
    return {
        "method": f"{prepared.method.spec.task} {prepared.method.spec.name}",
        "settings": settings,
        "seed": request.seed,
        "source": source_identity(prepared.checkpoint),
        "data": dict(prepared.hashes),
        **({"models": models} if (models := _models(prepared)) else {}),
        **({"pairs": [pair.record() for pair in prepared.pairs]} if prepared.pairs else {}),
        "evaluation batch size": prepared.evaluation.batch_size,
        "device": str(prepared.device),
        "dtype": str(prepared.dtype),
        "batch size": request.batch_size,
        "quantize": request.quantize,
        "guard": [prepared.guard, as_record(prepared.guarding)],
        "until": None if prepared.until is None else str(prepared.until),
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, transformers.__version__, version("peft"), bitsandbytes_version(prepared)],
    }


def _models(prepared: Prepared) -> dict[str, object]:
    return {name: source_identity(other.checkpoint) for name, other in prepared.others.items()}


def source_identity(checkpoint: Checkpoint) -> list[list[object]]:
    """Return name, size and time of the files with the weights: what tells a checkpoint without reading all of it."""
    files = sorted({header.path for header in checkpoint.headers.values()})
    return [[path.name, status.st_size, status.st_mtime_ns] for path in files for status in [path.stat()]]


def _match(folder: Path, wanted: Mapping[str, object]) -> None:
    """Compare a state's run with this one, or write down which run a new state belongs to."""
    path = folder / _NAME
    # JSON has no tuples: compare what would be read back.
    wanted = json.loads(json.dumps(wanted))
    if path.is_file():
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            # Killed while it was written, before any step.
            remove(folder)
        elif different := [name for name in wanted if found.get(name) != wanted[name]]:
            raise UsageError(
                f"the unfinished run in {folder.parent} differs in {_differences(found, wanted, different)}",
                "going on would mix two runs; only lr and clip may change",
                "give the same options, or start anew with --force in place of --resume",
            )
        else:
            return
    elif folder.exists():
        remove(folder)
    with writing(folder):
        folder.mkdir(mode=0o700)
        path.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8")
    sync_directory(folder)


def _differences(found: Mapping[str, object], wanted: Mapping[str, object], names: list[str]) -> str:
    parts = []
    for name in names:
        before, after = found.get(name), wanted[name]
        if isinstance(before, dict) and isinstance(after, dict):
            inner = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
            parts.append(f"{name} ({', '.join(inner)})")
        else:
            parts.append(name)
    return ", ".join(parts)
