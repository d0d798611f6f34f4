"""The forms of a result: a whole checkpoint, a patch file alone, or a peft adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.checkpoint import Checkpoint, Publication, file_digest
from llmsurgery.checkpoint.target import Claim
from llmsurgery.edits.build import write_patch
from llmsurgery.edits.delta import compare_files
from llmsurgery.edits.kinds import LowRank, TensorEdit
from llmsurgery.edits.write import Sink, TensorChange, write_edits
from llmsurgery.errors import UnsupportedError, UsageError, unknown_name
from llmsurgery.methods.settings import as_record
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.record import CARD, Recorded, keep_factors, low_rank_factors, write_recorded
from llmsurgery.train.config import TrainingConfig

FORMS = ("full", "patch", "adapter")
PATCH = "patch.safetensors"


@dataclass(frozen=True)
class Written:
    """A result that is on the disk but has no final name yet.

    Attributes:
        recorded: Changes, digests and size of the undo data.
        path: What the figures are measured on: a checkpoint, or an adapter.
        adapter: Whether it is an adapter, to be loaded onto the source.
        patch_bytes: Size of the patch file, None without one.
    """

    recorded: Recorded
    path: Path
    adapter: bool = False
    patch_bytes: int | None = None


def check_form(prepared: Prepared) -> None:
    """Refuse a form that the method does not have.

    Raises:
        UsageError: An unknown form, or an adapter of something that trains none.
    """
    save = prepared.request.save
    if save not in FORMS:
        raise unknown_name("form", save, FORMS, "--save takes full, patch or adapter")
    if save == "adapter" and adapter_training(prepared) is None:
        raise UsageError(
            f"{prepared.method.spec.name} has no adapter to save here",
            "only a run that trains LoRA adapters (train=lora) ends in one",
            "use --save patch for a small file, or --save full",
        )
    if save == "adapter" and prepared.structure.experts:
        dense = [target for target in prepared.targets if target.module.endswith(("gate_proj", "up_proj", "down_proj"))]
        if dense:
            raise UnsupportedError(
                f"an adapter on {dense[0].module} cannot be saved",
                "stock peft takes such names in a mixture-of-experts model for all experts when it loads an adapter",
                "use --save patch, or put the adapters on attention only (--set roles=attn.q,attn.o)",
            )


def adapter_training(prepared: Prepared) -> TrainingConfig | None:
    """Return the training settings of a run that trains adapters, else None."""
    training = getattr(prepared.config, "training", None)
    return training if isinstance(training, TrainingConfig) and training.train == "lora" else None


def open_publication(prepared: Prepared, edits: Sequence[TensorEdit], claim: Claim | None = None) -> Publication:
    """Return the publication of a run: a copy of the source, or an empty directory for a patch or adapter."""
    request = prepared.request
    full = request.save == "full"
    names = {edit.name for edit in edits} if full else set()
    return Publication(
        prepared.checkpoint,
        prepared.out,
        link=request.link,
        force=request.force,
        rewrite=names,
        carry=full,
        claim=claim,
    )


@contextmanager
def write_form(prepared: Prepared, publication: Publication, edits: Sequence[TensorEdit]) -> Iterator[Written]:
    """Write a result in the form that was asked for; it can be measured inside the `with` block.

    Args:
        prepared: The checked request.
        publication: The open publication of `open_publication`.
        edits: In-place tensor edits.

    Yields:
        What was written.
    """
    save = prepared.request.save
    if save == "patch":
        with _write_patch(prepared, publication, edits) as written:
            yield written
    elif save == "adapter":
        yield _write_adapter(prepared, publication, edits)
    else:
        yield _write_full(prepared, publication, edits)


def _write_full(prepared: Prepared, publication: Publication, edits: Sequence[TensorEdit]) -> Written:
    def write(observe: Sink | None) -> list[TensorChange]:
        return write_edits(prepared.checkpoint, publication, edits, prepared.structure.role_of, observe)

    recorded = write_recorded(publication, write, prepared.request.undo)
    if prepared.request.undo:
        keep_factors(publication, edits, recorded.changes)
    return Written(recorded, publication.path)


@contextmanager
def _write_patch(prepared: Prepared, publication: Publication, edits: Sequence[TensorEdit]) -> Iterator[Written]:
    source = prepared.checkpoint
    spec = prepared.method.spec
    step = {
        "task": spec.task,
        "method": spec.name,
        "settings": as_record(prepared.config),
        "seed": prepared.request.seed,
    }
    # Never published: it exists to be compared with and measured, and goes when the block ends.
    with Publication(
        source, publication.path / "applied", link=prepared.request.link, rewrite={edit.name for edit in edits}
    ) as applied:
        changes = write_edits(source, applied, edits, prepared.structure.role_of)
        result = Checkpoint.open(applied.path)
        names = [change.name for change in changes if change.changed]
        with publication.new_file(PATCH) as stream:
            write_patch(
                stream, source, result, names, low_rank_factors(edits), compare_files(source, result),
                {"operations": [step]},
            )  # fmt: skip
        patch = publication.path / PATCH
        recorded = Recorded(changes, {PATCH: file_digest(patch)}, None)
        yield Written(recorded, applied.path, patch_bytes=patch.stat().st_size)


def _write_adapter(prepared: Prepared, publication: Publication, edits: Sequence[TensorEdit]) -> Written:
    from llmsurgery.train.adapter import adapter_files

    training = adapter_training(prepared)
    factors = [edit for edit in edits if isinstance(edit, LowRank)]
    if training is None or len(factors) != len(edits):
        raise UsageError("this run has no adapter", "its edits are not those of LoRA adapters", "use --save patch")
    # Nothing is written into weights; the digests are those of the folded form.
    changes = write_edits(prepared.checkpoint, None, edits, prepared.structure.role_of)
    name = prepared.request.model or str(prepared.checkpoint.root)
    targets = {target.stored: target for target in prepared.targets}
    files = adapter_files([(targets[edit.name], edit) for edit in factors], training, name)
    for file, content in files.items():
        publication.write_file(file, content)
    digests = {file: file_digest(publication.path / file) for file in files if file != CARD}
    return Written(Recorded(changes, digests, None), publication.path, adapter=True)
