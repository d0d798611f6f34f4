"""The forms of a result: a whole checkpoint, a patch file alone, or a peft adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmsurgery.checkpoint import Checkpoint, Publication, file_digest
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.checkpoint.target import Claim
from llmsurgery.edits.arrange import arrange
from llmsurgery.edits.build import write_patch
from llmsurgery.edits.config import beside_files
from llmsurgery.edits.delta import compare_files
from llmsurgery.edits.evaluate import tensor_edits
from llmsurgery.edits.kinds import Config, File, LowRank, StoredEdit
from llmsurgery.edits.write import Sink, TensorChange, write_edits
from llmsurgery.errors import UnsupportedError, UsageError, unknown_name
from llmsurgery.methods.base import MethodResult
from llmsurgery.methods.settings import as_record
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.record import CARD, Recorded, keep_factors, low_rank_factors, write_recorded
from llmsurgery.run.roles import roles_with
from llmsurgery.train.config import TrainingConfig

FORMS = ("full", "patch", "adapter")
PATCH = "patch.safetensors"
BESIDE = ".llmsurgery"
"""Directory of what is kept beside a result and is no part of the model."""


@dataclass(frozen=True)
class Changes:
    """What a method returned.

    Attributes:
        edits: Edits of stored tensors.
        files: Files beside the weights that differ from the source's.
        kept: Small files for later operations on a whole checkpoint; name -> content.
    """

    edits: Sequence[StoredEdit]
    files: Sequence[File] = ()
    kept: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.edits and not self.files


def changes_of(checkpoint: Checkpoint, result: MethodResult) -> Changes:
    """Return what is to be written of what a method returned.

    Args:
        checkpoint: The source.
        result: The method's result.

    Raises:
        SurgeryError: The edits contradict each other: a method's bug.
        InputError: A value is to be set in a file that cannot take it.
    """
    edits = tensor_edits([edit for edit in result.edits if not isinstance(edit, File | Config)])
    return Changes(edits, beside_files(checkpoint, result.edits), result.beside)


@dataclass(frozen=True)
class Written:
    """A result that is on the disk but has no final name yet.

    Attributes:
        recorded: Changes, digests and size of the undo data.
        path: What the figures are measured on: a checkpoint, or what is to be loaded onto the source.
        export: Its kind: an "adapter" or a "processor" needs the source, a "bundle" runs its own code.
        layout: Where the tensors of the model lie.
        patch_bytes: Size of the patch file, None without one.
    """

    recorded: Recorded
    path: Path
    export: str
    layout: Layout
    patch_bytes: int | None = None

    @property
    def added(self) -> list[str]:
        """Names of tensors that the source does not have."""
        changes = self.recorded.changes
        return [change.name for change in changes if change.sha256_before is None and change.sha256_after is not None]


def check_form(prepared: Prepared) -> None:
    """Refuse a form that the method does not have.

    Raises:
        UsageError: An unknown form, or an adapter of something that trains none.
    """
    save = prepared.request.save
    if save not in FORMS:
        raise unknown_name("form", save, FORMS, "--save takes full, patch or adapter")
    if prepared.adapter is not None:
        _check_repaired(prepared, save)
        return
    if prepared.export == "processor" and save == "patch":
        raise UsageError(
            "a logits processor has no patch", "no byte of the model changes, and none is published", "use --save full"
        )
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


def _check_repaired(prepared: Prepared, save: str) -> None:
    """Refuse a form that a repaired adapter does not have; one of its base with it merged has all but that."""
    if prepared.export == "adapter" and save == "patch":
        raise UsageError("an adapter has no patch", "no byte of a model changes", "use --set form=merged, or no --save")
    if prepared.export == "plain" and save == "adapter":
        raise UsageError(
            "form=merged is no adapter", "it is the base with the adapter in its weights", "use --set form=adapter"
        )


def adapter_training(prepared: Prepared) -> TrainingConfig | None:
    """Return the training settings of a run that trains adapters, else None."""
    # What makes matrices smaller is no low-rank term beside them.
    whole = prepared.export == "plain" and not prepared.method.spec.structured
    training = getattr(prepared.config, "training", None) if whole else None
    return training if isinstance(training, TrainingConfig) and training.train == "lora" else None


def form_notice(prepared: Prepared) -> str | None:
    """Return what a user must know of a result that is no plain checkpoint; None for one that is."""
    plain = prepared.method.spec.plain_form
    advice = "" if plain is None else f"; --set form={plain} ends in plain weights"
    if prepared.export == "bundle":
        return f"the result is a bundle: it loads with trust_remote_code=True and in no other way{advice}"
    if prepared.export == "processor":
        return (
            "the result is a logits processor for generation with the unchanged model; the figures are those of both "
            f"together, and scores without the processor are those of the source{advice}"
        )
    return None


def open_publication(prepared: Prepared, changes: Changes, claim: Claim | None = None) -> Publication:
    """Return the publication of a run: a copy of the source, or an empty directory for what holds no model."""
    request = prepared.request
    full = request.save == "full" and prepared.export != "processor"
    arrangement = arrange(prepared.checkpoint, changes.edits if full else ())
    return Publication(
        prepared.checkpoint,
        prepared.out,
        link=request.link,
        force=request.force,
        rewrite=arrangement.rewrite,
        layout=arrangement.layout,
        carry=full,
        claim=claim,
    )


@contextmanager
def write_form(prepared: Prepared, publication: Publication, changes: Changes) -> Iterator[Written]:
    """Write a result in the form that was asked for; it can be measured inside the `with` block.

    Args:
        prepared: The checked request.
        publication: The open publication of `open_publication`.
        changes: Edits and files.

    Yields:
        What was written.
    """
    save = prepared.request.save
    if save == "patch":
        with _write_patch(prepared, publication, changes) as written:
            yield written
    elif save == "adapter":
        yield _write_adapter(prepared, publication, changes)
    elif prepared.export == "processor":
        _write_files(publication, changes)
        digests = {file.path: file_digest(publication.path / file.path) for file in changes.files}
        yield Written(Recorded([], digests, None), publication.path, prepared.export, publication.layout)
    else:
        yield _write_full(prepared, publication, changes)


def _write_files(publication: Publication, changes: Changes) -> None:
    for file in changes.files:
        publication.write_file(file.path, file.content)


def _write_all(
    prepared: Prepared, publication: Publication, changes: Changes, observe: Sink | None = None
) -> list[TensorChange]:  # fmt: skip
    """Write the files, and the edits unless the files are all there is."""
    _write_files(publication, changes)
    if not changes.edits and changes.files:
        return []
    source = prepared.checkpoint
    config = next((file.content for file in changes.files if file.path == "config.json"), None)
    role_of = roles_with(prepared.structure.role_of, source, config, publication.layout)
    return write_edits(source, publication, changes.edits, role_of, observe, bool(changes.files))


def _write_full(prepared: Prepared, publication: Publication, changes: Changes) -> Written:
    def write(observe: Sink | None) -> list[TensorChange]:
        return _write_all(prepared, publication, changes, observe)

    undo = prepared.request.undo
    moves = arrange(prepared.checkpoint, changes.edits).moves
    recorded = write_recorded(publication, write, undo, [file.path for file in changes.files], moves)
    if undo:
        keep_factors(publication, changes.edits, recorded.changes)
    for name, content in changes.kept.items():
        with publication.new_file(f"{BESIDE}/{name}") as stream:
            stream.write(content)
    return Written(recorded, publication.path, prepared.export, publication.layout)


@contextmanager
def _write_patch(prepared: Prepared, publication: Publication, changes: Changes) -> Iterator[Written]:
    source = prepared.checkpoint
    spec = prepared.method.spec
    step = {
        "task": spec.task,
        "method": spec.name,
        "settings": as_record(prepared.config),
        "seed": prepared.request.seed,
    }
    arrangement = arrange(source, changes.edits)
    rewrite, layout = arrangement.rewrite, arrangement.layout
    # Never published: it exists to be compared with and measured, and goes when the block ends.
    with Publication(
        source, publication.path / "applied", link=prepared.request.link, rewrite=rewrite, layout=layout
    ) as applied:
        written = _write_all(prepared, applied, changes)
        result = Checkpoint.open(applied.path)
        names = [change.name for change in written if change.changed]
        with publication.new_file(PATCH) as stream:
            write_patch(
                stream, source, result, names, low_rank_factors(source, changes.edits), compare_files(source, result),
                {"operations": [step]}, arrangement.moves,
            )  # fmt: skip
        patch = publication.path / PATCH
        recorded = Recorded(written, {PATCH: file_digest(patch)}, None)
        yield Written(recorded, applied.path, prepared.export, applied.layout, patch.stat().st_size)


def _write_adapter(prepared: Prepared, publication: Publication, changes: Changes) -> Written:
    from llmsurgery.train.adapter import adapter_files

    if prepared.adapter is not None:
        written = write_edits(prepared.checkpoint, None, changes.edits, prepared.structure.role_of)
        _write_files(publication, changes)
        digests = {file.path: file_digest(publication.path / file.path) for file in changes.files}
        return Written(Recorded(written, digests, None), publication.path, "adapter", publication.layout)
    training = adapter_training(prepared)
    edits = changes.edits
    factors = [edit for edit in edits if isinstance(edit, LowRank)]
    if training is None or len(factors) != len(edits) or changes.files:
        raise UsageError("this run has no adapter", "its edits are not those of LoRA adapters", "use --save patch")
    # Nothing is written into weights; the digests are those of the folded form.
    written = write_edits(prepared.checkpoint, None, edits, prepared.structure.role_of)
    name = prepared.request.model or str(prepared.checkpoint.root)
    targets = {target.stored: target for target in prepared.targets}
    files = adapter_files([(targets[edit.name], edit) for edit in factors], training, name)
    for file, content in files.items():
        publication.write_file(file, content)
    digests = {file: file_digest(publication.path / file) for file in files if file != CARD}
    return Written(Recorded(written, digests, None), publication.path, "adapter", publication.layout)
