"""Progress of long work: a bar on a terminal, and in a log a line every few seconds with rate and time left."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

LINE_EVERY = 10.0  # seconds


class Progress:
    """How far a piece of work has come, out of `total` units."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._lock = threading.Lock()
        self._started = self._last_line = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, count: int = 1, **figures: float) -> None:
        """Count units as done; `figures` (a loss, say) are shown beside them. Threads may call it at once."""
        with self._lock:
            self._advance(count, figures)

    def _advance(self, count: int, figures: dict[str, float]) -> None:
        self.done += count
        note = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY and self.done > 0:  # an upload that begins again takes back what it said
            self._last_line = now
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate
            each = f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"
            log.info(
                "%s: %s/%s %s (%.0f%%), %s/s, %s left  %s",
                self.label, f"{self.done:,}", f"{self.total:,}", self.unit, 100 * self.done / self.total, each,
                _clock(left), note,
            )  # fmt: skip

    def close(self) -> None:
        """End the bar."""
        if self._bar:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
