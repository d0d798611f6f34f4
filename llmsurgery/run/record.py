"""What every operation keeps beside its result: undo data, factors for a small patch, digests of side files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.edits.build import write_factors
from llmsurgery.edits.delta import side_digests
from llmsurgery.edits.kinds import LowRank, TensorEdit
from llmsurgery.edits.undo import NAME as UNDO
from llmsurgery.edits.undo import UndoWriter
from llmsurgery.edits.write import Sink, TensorChange, group_edits

FACTORS = ".llmsurgery/factors.safetensors"
CARD = "README.md"


@dataclass(frozen=True)
class Recorded:
    """What was written.

    Attributes:
        changes: One record per edited tensor.
        files: SHA-256 of the result's side files by name.
        undo_bytes: Size of the undo data, None without them.
    """

    changes: list[TensorChange]
    files: dict[str, str]
    undo_bytes: int | None


def write_recorded(
    publication: Publication,
    write: Callable[[Sink | None], list[TensorChange]],
    undo: bool,
    replaced: Iterable[str] = (),
) -> Recorded:
    """Write a result and keep the way back to its source.

    Args:
        publication: The open publication.
        write: Writes tensors and side files; gets the observer of changed blocks.
        undo: Whether undo data are wanted.
        replaced: Side files that `write` replaces, adds or removes; the card is always one of them.
    """
    if not undo:
        changes = write(None)
        return Recorded(changes, side_digests(Checkpoint.open(publication.path)), None)
    source = publication.source
    with publication.new_file(UNDO) as stream:
        writer = UndoWriter(stream)
        changes = write(writer.add_rows)
        for name in sorted({CARD, *replaced}):
            path = source.root / name
            writer.add_file(name, path if path.is_file() else None)
        # Records of an earlier run are not carried over into the result, and so would be missing after a revert.
        for path in sorted(source.root.iterdir()):
            if path.is_file() and path.name not in {CARD, *replaced} and _is_record(path.name):
                writer.add_file(path.name, path)
        files = side_digests(Checkpoint.open(publication.path))
        undo_bytes = writer.finish(changes, publication.skipped, files)
    return Recorded(changes, files, undo_bytes)


def _is_record(name: str) -> bool:
    return name in {"surgery.json", "report.html"} or name.endswith(".report.json")


def low_rank_factors(edits: Sequence[TensorEdit]) -> dict[str, list[LowRank]]:
    """Return the factors of the tensors that get low-rank terms and nothing else."""
    factors: dict[str, list[LowRank]] = {}
    for name, group in group_edits(edits).items():
        terms = [edit for edit in group if isinstance(edit, LowRank)]
        if len(terms) == len(group):
            factors[name] = terms
    return factors


def keep_factors(publication: Publication, edits: Sequence[TensorEdit], changes: Sequence[TensorChange]) -> None:
    """Keep low-rank factors beside the result, so that `llmsurgery diff -o` can make a small patch of it."""
    if factors := low_rank_factors(edits):
        with publication.new_file(FACTORS) as stream:
            write_factors(stream, factors, {change.name: change.sha256_after for change in changes})
