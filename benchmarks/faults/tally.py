"""What came of one kind of fault."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts of one kind of fault.

    Attributes:
        name: The fault.
        expected: What must happen.
        tried: How often it was tried.
        lost: One line for every time in which something else happened.
        seen: What was seen how often: where a kill fell, which exit code a run ended with.
        skipped: Why it could not be tried here; empty if it was.
    """

    name: str
    expected: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    skipped: str = ""

    @property
    def survived(self) -> int:
        """How often what was expected happened."""
        return self.tried - len(self.lost)

    def add(self, seen: str, problems: list[str], label: str) -> None:
        """Count one try.

        Args:
            seen: What was seen.
            problems: What went wrong; none if it was survived.
            label: Which try it was.
        """
        self.tried += 1
        self.seen[seen] += 1
        if problems:
            self.lost.append(f"{label} ({seen}): {'; '.join(problems)}")

    def record(self) -> dict[str, object]:
        """Return the counts as JSON values."""
        return {
            "name": self.name,
            "expected": self.expected,
            "tried": self.tried,
            "survived": self.survived,
            "lost": self.lost,
            "seen": dict(sorted(self.seen.items())),
            "skipped": self.skipped,
        }
