"""Suites by name. No heavy import."""

from __future__ import annotations

from llmsurgery.errors import unknown_name
from llmsurgery.evaluate.suites.base import Suite
from llmsurgery.evaluate.suites.muse import Muse
from llmsurgery.evaluate.suites.ort import Ort
from llmsurgery.evaluate.suites.semeval25 import Semeval25
from llmsurgery.evaluate.suites.tofu import Tofu
from llmsurgery.evaluate.suites.wmdp import Wmdp

_SUITES: tuple[Suite, ...] = (Tofu(), Muse(), Wmdp(), Semeval25(), Ort())


def find_suite(name: str) -> Suite:
    """Return a suite by name.

    Raises:
        UsageError: There is none.
    """
    known = {suite.spec.name: suite for suite in _SUITES}
    if name not in known:
        raise unknown_name("suite", name, known, f"suites are {', '.join(known)}")
    return known[name]
