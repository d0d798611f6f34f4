"""What every operation keeps beside its result: undo data, factors for a small patch, digests of side files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.edits.arrange import arrange
from llmsurgery.edits.build import write_factors
from llmsurgery.edits.delta import side_digests
from llmsurgery.edits.kinds import LowRank, Slice, StoredEdit
from llmsurgery.edits.origin import Moves
from llmsurgery.edits.undo import NAME as UNDO
from llmsurgery.edits.undo_writer import UndoWriter
from llmsurgery.edits.write import Sink, TensorChange

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
    moves: Moves | None = None,
) -> Recorded:
    """Write a result and keep the way back to its source.

    Args:
        publication: The open publication.
        write: Writes tensors and side files; gets the observer of changed blocks.
        undo: Whether undo data are wanted.
        replaced: Side files that `write` replaces, adds or removes; the card is always one of them.
        moves: How names and shapes change; the publication's layout is that of these moves.
    """
    if not undo:
        changes = write(None)
        return Recorded(changes, side_digests(Checkpoint.open(publication.path)), None)
    source = publication.source
    with publication.new_file(UNDO) as stream:
        writer = UndoWriter(stream, source)
        changes = write(writer.add_rows)
        for name in sorted({CARD, *replaced}):
            path = source.root / name
            writer.add_file(name, path if path.is_file() else None)
        writer.add_layout(publication.layout)
        # Records of an earlier run are not carried over into the result, and so would be missing after a revert.
        for path in sorted(source.root.iterdir()):
            if path.is_file() and path.name not in {CARD, *replaced} and _is_record(path.name):
                writer.add_file(path.name, path)
        files = side_digests(Checkpoint.open(publication.path))
        undo_bytes = writer.finish(changes, publication.skipped, files, moves)
    return Recorded(changes, files, undo_bytes)


def _is_record(name: str) -> bool:
    return name in {"surgery.json", "report.html"} or name.endswith(".report.json")


def low_rank_factors(checkpoint: Checkpoint, edits: Sequence[StoredEdit]) -> dict[str, list[LowRank]]:
    """Return the factors of the tensors that get low-rank terms and nothing else but slices."""
    factors: dict[str, list[LowRank]] = {}
    for name, result in arrange(checkpoint, edits).results.items():
        terms: list[LowRank] | None = [] if result.origin.source is not None else None
        for step in result.steps:
            if terms is not None and isinstance(step, LowRank):
                terms.append(LowRank(name, step.u, step.v))
            elif terms is not None and isinstance(step, Slice):
                terms = [_sliced(term, step) for term in terms]
            else:
                terms = None
        if terms:
            factors[name] = terms
    return factors


def _sliced(term: LowRank, step: Slice) -> LowRank:
    return replace(term, u=term.u[step.keep]) if step.axis == 0 else replace(term, v=term.v[:, step.keep])


def keep_factors(publication: Publication, edits: Sequence[StoredEdit], changes: Sequence[TensorChange]) -> None:
    """Keep low-rank factors and origins beside the result, so that `llmsurgery diff -o` makes a small patch of it."""
    source = publication.source
    factors, moves = low_rank_factors(source, edits), arrange(source, edits).moves
    origins = {
        name: (origin, origin.shape if origin.source is None else source.info(origin.source).shape)
        for name, origin in moves.origins.items()
    }
    digests = {change.name: change.sha256_after for change in changes if change.sha256_after is not None}
    if factors or origins:
        with publication.new_file(FACTORS) as stream:
            write_factors(stream, factors, digests, origins)
