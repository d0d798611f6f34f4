"""Several forwards of one model that go from block to block together, so that each block is needed once for all.

Every forward runs in a thread of its own, because a forward cannot be left in its middle otherwise; the threads take
turns and never run at once. A forward announces each block before it enters it and waits there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

THREAD = "forward"
"""Name of the threads that forwards run in."""


class Ended(BaseException):
    """Unwinds a forward that nobody waits for any more; not an `Exception`, so that no handler on its way keeps it."""


class Call(Generic[T]):
    """One forward that can be halted.

    Args:
        work: Runs the forward, in inference mode.
        device: Where it runs.

    Attributes:
        place: Block that it waits for, None if it has not begun or is over.
        result: What `work` returned; None if it was ended.
        batch: Digest of its batch, once the first block has been reached and if anybody asked.
        start: Block that it begins at, and what enters that; None: the first one.
    """

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        self.place: int | None = None
        self.result: T | None = None
        self.batch: bytes | None = None
        self.start: tuple[int, torch.Tensor] | None = None
        self._work, self._device = work, device
        self._error: BaseException | None = None
        self._ending = False
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)

    def _run(self) -> None:
        _CURRENT.set(self)
        try:
            # Inference mode and the current device belong to a thread.
            with (
                torch.inference_mode(),
                torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext(),
            ):
                self.result = self._work()
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - raised in the caller by `advance`
            self._error = error
        finally:
            self.place = None
            self._halted.release()

    def advance(self) -> None:
        """Let the forward go on to the next block, or to its end.

        Raises:
            BaseException: What the forward raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def halt(self, place: int) -> None:
        """Wait for a block; called by the forward itself.

        Raises:
            Ended: The forward is to end here.
        """
        if not self._ending:
            self.place = place
            self._halted.release()
            self._go.acquire()
        if self._ending:
            raise Ended

    def end(self) -> None:
        """End the thread at the next block that it reaches, and wait for that."""
        if self._thread.ident is not None:
            self._ending = True
            self._go.release()
            self._thread.join()


_CURRENT: ContextVar[Call[Any] | None] = ContextVar("call", default=None)


def current_call() -> Call[Any] | None:
    """Return the call whose thread this is, None outside of any."""
    return _CURRENT.get()


@contextmanager
def private_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Let a hook that a call registers see this call alone, for the length of a `with` block.

    Calls take turns on the same modules, and a forward with hooks of its own would otherwise catch what others pass.
    Hooks that are registered outside of the calls see all of them.
    """

    def private(register: Callable[..., Any]) -> Callable[..., Any]:
        def own(hook: Callable[..., Any], **options: Any) -> Any:
            call = current_call()
            if call is None:
                return register(hook, **options)
            return register(lambda *a, **k: hook(*a, **k) if current_call() is call else None, **options)

        return own

    names = ("register_forward_hook", "register_forward_pre_hook")
    modules = list(model.modules())
    for module in modules:
        for name in names:
            module.__dict__[name] = private(getattr(module, name))
    try:
        yield
    finally:
        for module in modules:
            for name in names:
                del module.__dict__[name]
