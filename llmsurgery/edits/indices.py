"""Which entries of a tensor an edit touches, in as few bytes as possible.

Three encodings of a set of flat positions; the builder of a patch takes the smallest:

- `bits`: one bit per entry, first entry in the highest bit. Best for many scattered entries.
- `gaps`: per position the number of untouched entries before it, as a variable-length integer. Best for few.
- `runs`: per run of neighbours the number of untouched entries before it and its length less one. Best for rows.

Variable-length integers hold seven bits a byte, lowest first; the highest bit says that more follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint.container import PartReader
from llmsurgery.errors import DamagedError

ENCODINGS = ("bits", "gaps", "runs")
_PIECE = 1 << 20
_LONGEST = 9

Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


def _gap_values(flags: Flags, before: int) -> tuple[Integers, int]:
    """Return the gaps of a block, and the untouched entries at its end; `before` are those at the end of the last."""
    at = np.flatnonzero(flags)
    if not at.size:
        return at, before + flags.size
    gaps = np.diff(at, prepend=-1) - 1
    gaps[0] += before
    return gaps, int(flags.size - 1 - at[-1])


def _run_values(flags: Flags, before: int) -> tuple[Integers, int]:
    """Return (gap, length - 1) pairs of a block; a run that crosses blocks is simply cut in two."""
    edges = np.flatnonzero(np.diff(flags.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
    starts, ends = edges[::2], edges[1::2]
    if not starts.size:
        return starts, before + flags.size
    values = np.empty(2 * starts.size, dtype=np.int64)
    values[::2] = starts - np.concatenate(([-before], ends[:-1]))
    values[1::2] = ends - starts - 1
    return values, int(flags.size - ends[-1])


_VALUES = {"gaps": _gap_values, "runs": _run_values}


def _lengths(values: Integers) -> npt.NDArray[np.int64]:
    lengths = np.ones(values.size, dtype=np.int64)
    bound = 128
    while values.size and bound <= int(values.max()):
        lengths += values >= bound
        bound <<= 7
    return lengths


def _pack(values: Integers) -> bytes:
    lengths = _lengths(values)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    result = np.zeros(int(ends[-1]) if ends.size else 0, dtype=np.uint8)
    for digit in range(int(lengths.max(initial=0))):
        longer = lengths > digit
        more = (lengths[longer] > digit + 1).astype(np.uint8) << 7
        result[starts[longer] + digit] = ((values[longer] >> (7 * digit)) & 0x7F).astype(np.uint8) | more
    return result.tobytes()


@dataclass
class Sizes:
    """Bytes that each encoding of a set takes; fed block by block.

    Attributes:
        entries: Entries seen.
        count: Entries in the set.
        gaps: Bytes as `gaps`.
        runs: Bytes as `runs`.
    """

    entries: int = 0
    count: int = 0
    gaps: int = 0
    runs: int = 0
    _gap_before: int = 0
    _run_before: int = 0

    def add(self, flags: Flags) -> int:
        """Add the flags of the next entries, in order; return how many are set."""
        flags = flags.reshape(-1)
        count = int(np.count_nonzero(flags))
        self.entries += flags.size
        self.count += count
        values, self._gap_before = _gap_values(flags, self._gap_before)
        self.gaps += int(_lengths(values).sum())
        values, self._run_before = _run_values(flags, self._run_before)
        self.runs += int(_lengths(values).sum())
        return count

    def best(self) -> tuple[str, int]:
        """Return the encoding of fewest bytes and its size."""
        sizes = {"gaps": self.gaps, "runs": self.runs, "bits": (self.entries + 7) // 8}
        name = min(sizes, key=lambda encoding: sizes[encoding])
        return name, sizes[name]


def encode_flags(encoding: str, blocks: Iterable[Flags]) -> Iterator[bytes]:
    """Encode the flags of a tensor.

    Args:
        encoding: One of `ENCODINGS`.
        blocks: Flags of consecutive entries.

    Yields:
        The bytes, piece by piece.
    """
    if encoding == "bits":
        tail = np.empty(0, dtype=np.bool_)
        for flags in blocks:
            pending = np.concatenate((tail, flags.reshape(-1)))
            whole = pending.size - pending.size % 8
            yield np.packbits(pending[:whole]).tobytes()
            tail = pending[whole:]
        yield np.packbits(tail).tobytes()
        return
    before = 0
    for flags in blocks:
        values, before = _VALUES[encoding](flags.reshape(-1), before)
        yield _pack(values)


def encode_positions(positions: Integers) -> bytes:
    """Encode a few positions, in ascending order, as `gaps`."""
    return _pack(np.diff(positions, prepend=-1) - 1)


class FlagReader:
    """Decodes the flags of a tensor front to back, in bounded memory.

    Args:
        encoding: One of `ENCODINGS`.
        reader: Delivers the encoded bytes.
        entries: Entries of the tensor.
    """

    def __init__(self, encoding: str, reader: PartReader, entries: int) -> None:
        self.encoding = encoding
        self.reader = reader
        self.entries = entries
        self.position = 0  # first entry not delivered
        self._bits = np.empty(0, dtype=np.bool_)
        self._bytes = np.empty(0, dtype=np.uint8)
        self._starts = np.empty(0, dtype=np.int64)
        self._ends = np.empty(0, dtype=np.int64)
        self._known = 0  # entries that decoded intervals reach up to

    def take(self, count: int) -> Flags:
        """Return the flags of the next `count` entries.

        Raises:
            DamagedError: The bytes are no valid encoding.
        """
        first, last = self.position, self.position + count
        self.position = last
        if self.encoding == "bits":
            needed = count - self._bits.size
            if needed > 0:
                read = np.frombuffer(self.reader.take((needed + 7) // 8), dtype=np.uint8)
                self._bits = np.concatenate((self._bits, np.unpackbits(read).view(np.bool_)))
            if self._bits.size < count:
                raise self._damaged()
            flags, self._bits = self._bits[:count], self._bits[count:]
            return flags
        edges = np.zeros(count + 1, dtype=np.int8)
        while True:
            inside = self._starts < last
            # Intervals are disjoint and in order: no entry of `edges` gets more than one start and one end.
            edges[np.maximum(self._starts[inside], first) - first] += 1
            edges[np.minimum(self._ends[inside], last) - first] -= 1
            waiting = self._ends > last
            self._starts, self._ends = self._starts[waiting], self._ends[waiting]
            if self._known >= last or not self._decode():
                return np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)

    def finish(self) -> None:
        """Check that nothing is left over.

        Raises:
            DamagedError: The bytes go on after the last entry.
        """
        if self.reader.left or self._bytes.size or self._starts.size or self._bits.size > 7:
            raise self._damaged()

    def _decode(self) -> bool:
        """Decode one more piece into intervals; return False at the end."""
        piece = np.frombuffer(self.reader.take(_PIECE), dtype=np.uint8)
        content = np.concatenate((self._bytes, piece))
        ends = np.flatnonzero(content < 128) + 1
        if self.encoding == "runs":
            ends = ends[: ends.size - ends.size % 2]
        if not ends.size:
            self._bytes = content
            if content.size and (not piece.size or content.size > 2 * _LONGEST):
                raise self._damaged()
            return bool(piece.size)
        used = int(ends[-1])
        # Two values of a pair count as one unit, so `ends` may stop short of the last complete value.
        values = self._values(content[:used], np.flatnonzero(content[:used] < 128) + 1)
        self._bytes = content[used:]
        gaps, lengths = (values[::2], values[1::2] + 1) if self.encoding == "runs" else (values, np.ones_like(values))
        # Bounded first, so that the sums cannot overflow.
        if (gaps > self.entries).any() or (lengths > self.entries).any():
            raise self._damaged()
        stops = self._known + np.cumsum(gaps + lengths)
        if int(stops[-1]) > self.entries or (stops < 0).any():
            raise self._damaged()
        self._starts = np.concatenate((self._starts, stops - lengths))
        self._ends = np.concatenate((self._ends, stops))
        self._known = int(stops[-1])
        return True

    def _values(self, content: npt.NDArray[np.uint8], ends: Integers) -> Integers:
        starts = np.concatenate((np.zeros(1, dtype=np.int64), ends[:-1]))
        lengths = ends - starts
        if int(lengths.max()) > _LONGEST:
            raise self._damaged()
        digits = np.arange(content.size) - np.repeat(starts, lengths)
        return np.asarray(np.add.reduceat((content & 0x7F).astype(np.int64) << (7 * digits), starts))

    def _damaged(self) -> DamagedError:
        return DamagedError(
            f"part {self.reader.info.name!r} of {str(self.reader.info.path)!r} is damaged",
            f"its {self.encoding} are no valid positions in a tensor of {self.entries} entries",
            "make the patch again",
        )
