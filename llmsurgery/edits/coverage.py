"""Coverage: how many tensors a run targeted, how many it matched, how many it changed, per role."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmsurgery.edits.write import TensorChange


@dataclass(frozen=True)
class RoleCoverage:
    """Counts for one role.

    Attributes:
        role: Role name.
        targeted: Tensors the method's plan named.
        matched: Of those, tensors for which the method produced an edit.
        changed: Tensors whose stored bytes changed.
    """

    role: str
    targeted: int
    matched: int
    changed: int


def coverage(targets: Iterable[tuple[str, str]], changes: Sequence[TensorChange]) -> list[RoleCoverage]:
    """Count targeted, matched and changed tensors per role.

    Args:
        targets: (stored name, role) of every planned tensor; a tied tensor appears once.
        changes: What the writer recorded.
    """
    targeted: dict[str, set[str]] = {}
    for name, role in targets:
        targeted.setdefault(role, set()).add(name)
    for change in changes:
        targeted.setdefault(change.role, set())
    rows = []
    for role, names in targeted.items():
        of_role = [change for change in changes if change.role == role]
        rows.append(
            RoleCoverage(
                role=role,
                targeted=len(names),
                matched=sum(change.name in names for change in of_role),
                changed=sum(change.changed for change in of_role),
            )
        )
    return rows
