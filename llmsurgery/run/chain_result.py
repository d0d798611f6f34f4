"""The end of a recipe as one change of its source: where tensors come from, what changed, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llmsurgery.checkpoint import Checkpoint, Publication, tensor_digest
from llmsurgery.checkpoint.carry import permission_bits
from llmsurgery.checkpoint.target import Claim
from llmsurgery.compute.progress import Progress
from llmsurgery.edits.build import write_factors
from llmsurgery.edits.delta import FileDelta, compare_files
from llmsurgery.edits.kinds import LowRank
from llmsurgery.edits.origin import Moves, Origin, Stored, compose
from llmsurgery.edits.undo import NAME as UNDO
from llmsurgery.edits.write import Sink, Streamed, TensorChange, gone_tensor, moved_tensor, records_of, write_tensor
from llmsurgery.errors import NoEffectError
from llmsurgery.run.diff import kept_patch, moves_between
from llmsurgery.run.forms import BESIDE
from llmsurgery.run.record import FACTORS, Recorded, write_recorded
from llmsurgery.run.roles import roles_of, roles_with


@dataclass(frozen=True)
class Whole:
    """What several operations together made of a source.

    Attributes:
        source: The model that the first of them edited.
        last: The result of the last.
        moves: How names and shapes of the last follow from those of the source.
        changed: Tensors of the last that are other bytes than what they come from.
        files: Side files that differ.
        factors: Low-rank terms of tensors that one operation alone changed.
    """

    source: Checkpoint
    last: Checkpoint
    moves: Moves
    changed: tuple[str, ...]
    files: Sequence[FileDelta]
    factors: Mapping[str, Sequence[LowRank]]


def whole_change(places: Sequence[Checkpoint], edited: Sequence[Sequence[str]], progress: Progress) -> Whole:
    """Return what operations together made of their source.

    Args:
        places: The source, and the result of every operation, in order.
        edited: For every operation, the names of the tensors in its manifest; no other changed.
        progress: Told of long work.

    Raises:
        NoEffectError: The last is equal to the source.
    """
    source, last = places[0], places[-1]
    moves = _composed(places, progress)
    mentioned = dict.fromkeys(name for names in edited for name in names)
    candidates = [name for name in {**mentioned, **dict.fromkeys(moves.origins)} if name in last.tensors]
    with progress.task("comparing with the source", len(candidates)) as tick:
        changed = []
        for name in candidates:
            if _differs(source, last, moves.origin(source, name)):
                changed.append(name)
            tick()
    files = compare_files(source, last)
    if not changed and not moves and not files:
        raise NoEffectError(
            "the result of the steps is the model that they started from", "they undo each other", "drop one of them"
        )
    return Whole(source, last, moves, tuple(changed), files, _single_factors(places[1:], edited, moves, progress))


def _composed(places: Sequence[Checkpoint], progress: Progress) -> Moves:
    """Follow names and shapes through every operation."""
    origins: dict[str, Origin] = {}
    for before, after in pairwise(places):
        moves = moves_between(before, after, kept_patch(after, progress))
        following = {name: _follow(moves.origin(before, name), origins) for name in after.tensors}
        origins = {name: origin for name, origin in following.items() if not origin.in_place}
    source, last = places[0], places[-1]
    taken = {origin.source for origin in origins.values()}
    stays = {name for name in last.tensors if name not in origins}
    return Moves(origins, tuple(name for name in source.tensors if name not in taken and name not in stays))


def _follow(step: Origin, earlier: Mapping[str, Origin]) -> Origin:
    """Return the origin in the source of a tensor whose origin in a later checkpoint is known."""
    base = earlier.get(step.source) if step.source is not None else None
    if base is None:
        return step
    keep = dict(base.keep)
    for axis, indices in step.keep.items():
        keep = compose(keep, axis, indices)
    return Origin(step.name, step.dtype, step.shape, base.source, keep if base.source is not None else {})


def _differs(source: Checkpoint, last: Checkpoint, origin: Origin) -> bool:
    if origin.source is None or origin.keep:
        return True
    old, new = source.info(origin.source), last.info(origin.name)
    return tensor_digest(old.path, old.start, old.end) != tensor_digest(new.path, new.start, new.end)


def _single_factors(
    results: Sequence[Checkpoint], edited: Sequence[Sequence[str]], moves: Moves, progress: Progress
) -> dict[str, Sequence[LowRank]]:
    """Return the factors of tensors that keep their place and that one operation alone edited."""
    found: dict[str, Sequence[LowRank]] = {}
    for result, own in zip(results, edited, strict=True):
        kept = kept_patch(result, progress)
        for name, tensor in kept.tensors.items() if kept is not None else ():
            alone = sum(name in names for names in edited) == 1 and name in own
            if alone and name not in moves.origins and name not in moves.gone and tensor.source in (None, name):
                found[name] = kept.low_rank(tensor) if kept is not None else ()
    return {name: terms for name, terms in found.items() if terms}


def open_whole(whole: Whole, out: Path, link: bool, force: bool, claim: Claim) -> Publication:
    """Return the publication in which the result is built from a copy of the source."""
    layout, rewrite = whole.moves.layout(whole.source), set(whole.changed)
    return Publication(whole.source, out, link=link, force=force, rewrite=rewrite, layout=layout, claim=claim)


def write_whole(whole: Whole, publication: Publication, undo: bool, results: Sequence[Checkpoint]) -> Recorded:
    """Write the result, and the way back to the source.

    Args:
        whole: What changed.
        publication: Of `open_whole`.
        undo: Whether undo data are wanted.
        results: The results of all operations, in order: what they keep for later ones is kept.
    """
    source, last = whole.source, whole.last
    config = next((file for file in whole.files if file.path == "config.json" and file.after is not None), None)
    content = (last.root / "config.json").read_bytes() if config is not None else None
    role_of = roles_with(roles_of(source), source, content, publication.layout)

    def write(observe: Sink | None) -> list[TensorChange]:
        for file in whole.files:
            if file.after is None:
                publication.remove_file(file.path)
            else:
                path = last.root / file.path
                publication.write_file(file.path, path.read_bytes(), permission_bits(path))
        return _write_tensors(whole, publication, role_of, observe)

    recorded = write_recorded(publication, write, undo, [file.path for file in whole.files], whole.moves)
    if undo:
        _keep_factors(whole, publication, recorded)
    for path in [path for result in results for path in sorted((result.root / BESIDE).glob("*")) if path.is_file()]:
        name = f"{BESIDE}/{path.name}"
        if name not in (UNDO, FACTORS):
            publication.write_file(name, path.read_bytes())
    return recorded


def _write_tensors(
    whole: Whole, publication: Publication, role_of: Callable[[str], str], observe: Sink | None
) -> list[TensorChange]:  # fmt: skip
    source, last, moves = whole.source, whole.last, whole.moves
    streamed: dict[str, Streamed] = {}
    for name in dict.fromkeys([*whole.changed, *moves.origins]):
        origin = moves.origin(source, name)
        if name not in whole.changed and origin.source is not None:
            streamed[name] = moved_tensor(source, origin.source)
            continue

        def compute(raw: Stored, start: int, stop: int, origin: Origin = origin) -> Stored:
            return last.read(origin.name, *origin.rows(start, stop))

        streamed[name] = write_tensor(source, origin, compute, publication, observe)
    gone = {name: gone_tensor(source, name, observe) for name in moves.gone}
    sources = [moves.origin(source, name).source or name for name in streamed]
    names = dict.fromkeys([*sources, *streamed, *gone])
    return records_of(source, names, moves, streamed, gone, role_of)


def _keep_factors(whole: Whole, publication: Publication, recorded: Recorded) -> None:
    origins = {
        name: (origin, origin.shape if origin.source is None else whole.source.info(origin.source).shape)
        for name, origin in whole.moves.origins.items()
    }
    digests = {change.name: change.sha256_after for change in recorded.changes if change.sha256_after is not None}
    factors = {name: terms for name, terms in whole.factors.items() if name in digests}
    if factors or origins:
        with publication.new_file(FACTORS) as stream:
            write_factors(stream, factors, digests, origins)
