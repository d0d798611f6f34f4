"""The exception tree: one class per exit code, every message in three parts.

A user of the command line sees the three parts on standard error (what happened, why, what to do next) and the
class's exit code; a user of the Python API catches `SurgeryError` or one of its subclasses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class SurgeryError(Exception):
    """Base of every error the toolkit raises on purpose.

    Args:
        what: What happened, naming the tensor, file, line or option.
        why: Why it is an error.
        fix: What the user can do next.
    """

    exit_code = 1
    kind = "bug"

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = _printable(what)
        self.why = _printable(why)
        self.fix = _printable(fix)

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.fix) if part)

    def as_dict(self) -> dict[str, str]:
        """Return the parts as the JSON object printed under `--json`."""
        return {"kind": self.kind, "what": self.what, "why": self.why, "fix": self.fix}


_LONGEST = 2000
# User and password of an address (a path has lost one of its slashes), and a token of the hub.
_SECRET = re.compile(r"\b([a-z]{2,}:/{1,2})[^/@\s'\"]+(?=@)|\bhf_[A-Za-z0-9]{16,}")


def _printable(text: str) -> str:
    """Return a part of a message as terminals, logs and JSON can take it: it may quote what others have written.

    Passwords in addresses and tokens are left out.
    """
    text = _SECRET.sub(r"\1***", text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode() for sign in text
    )


class UsageError(SurgeryError):
    """Unknown or missing option, method or hyperparameter; an output that already exists."""

    exit_code = 2
    kind = "usage"


class InputError(SurgeryError):
    """A model, data file or record that is missing, malformed or empty."""

    exit_code = 3
    kind = "input"


class UnsupportedError(SurgeryError):
    """An architecture, checkpoint format or method/model combination that is not supported."""

    exit_code = 4
    kind = "unsupported"


class NoEffectError(SurgeryError):
    """Nothing matched, or no stored weight moved."""

    exit_code = 5
    kind = "no effect"


class GateError(SurgeryError):
    """A required metric did not hold; the checkpoint was not published."""

    exit_code = 6
    kind = "gate"
    report: dict[str, object] | None = None
    """What was measured, for the JSON document of the failure."""
    examples: tuple[Any, ...] = ()
    """Answers before and after, for a report."""


class ResourceError(SurgeryError):
    """Out of memory or disk, or a target that cannot be written."""

    exit_code = 7
    kind = "resource"


class DamagedError(SurgeryError):
    """A checkpoint that is truncated, inconsistent, incomplete or holds NaN or Inf."""

    exit_code = 8
    kind = "damaged"


class DivergedError(SurgeryError):
    """Training produced a loss or a weight that is not finite."""

    exit_code = 9
    kind = "diverged"


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known names nearest to a mistyped one, best first.

    Args:
        name: What the user typed.
        known: The valid names.
        count: How many to return at most.
    """
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.3)


def unknown_name(what: str, name: str, known: Iterable[str], fix: str = "") -> UsageError:
    """Build the usage error for an unknown name, listing the three nearest known ones.

    Args:
        what: The kind of thing that was named, for example "method".
        name: What the user typed.
        known: The valid names.
        fix: What to do next; by default the nearest names are offered.
    """
    names = list(known)
    near = nearest_names(name, names) or sorted(names)[:3]
    return UsageError(f"unknown {what} {name!r}", f"nearest: {', '.join(near)}", fix or "use one of the names above")
