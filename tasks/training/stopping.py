"""SIGTERM, as a pod gets it before it is evicted: end soon, leave nothing half-done, be run again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from tasks.errors import RetryableError


class StoppedError(RetryableError):
    """The process was asked to end before its work was done."""


class Stopping:
    """While it is entered, SIGTERM raises `StoppedError`, at once or, where that is `deferred`, when asked."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            self.raise_if_requested()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal only sets `requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if_requested(self) -> None:
        """Raise `StoppedError` when a signal has come."""
        if self.requested:
            raise StoppedError("stopped by SIGTERM; what was done is kept, and the next try goes on from there")
