"""Progress in a task's log: how far the work is, how fast it goes, and how long it will still take."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from tasks import progress
from tasks.progress import Progress


def test_log_says_how_far_the_work_is_and_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = iter([100.0, 105.0, 110.0, 120.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Progress("epoch 1/3", 200, "steps") as shown:
        shown.advance(10)  # too soon for a line
        shown.advance(10, loss=1.25)
        shown.advance(20)
    first, second = caplog.messages
    assert first == "epoch 1/3: 20/200 steps (10%), 2/s, 1:30 left  loss 1.25"
    assert second.startswith("epoch 1/3: 40/200 steps (20%), 2/s, 1:20 left")
