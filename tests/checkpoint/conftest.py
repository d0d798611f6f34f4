from __future__ import annotations

import errno
import fcntl

import pytest

from .publishing import refuse


@pytest.fixture
def no_reflink(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file system everywhere, as far as the tests can see."""
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
