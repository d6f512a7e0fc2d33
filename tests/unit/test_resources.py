"""What training says, and with which exit code, when memory, disk or the store is not there."""

from __future__ import annotations

import errno
import logging

import numpy as np
import pytest
import tensorflow as tf
from safetensors import SafetensorError

from tasks.errors import RetryableError, SettingsError
from tasks.storage import Store
from tasks.train import resources
from tasks.training.checkpoints import Checkpoints


@pytest.mark.parametrize("error", [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")])
def test_too_little_memory_is_a_matter_of_settings(error: Exception) -> None:
    with pytest.raises(SettingsError, match=r"lower training\.batch_size"), resources():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_worth_another_try_elsewhere(error: Exception) -> None:
    with pytest.raises(RetryableError, match="is full: give the step more disk"), resources():
        raise error


def test_other_faults_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), resources():
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_store_that_is_away_does_not_stop_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was trained is not thrown away because it cannot be saved at the moment."""
    for name, value in {
        "S3_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1",
        "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    checkpoints = Checkpoints(Store("bucket"), "runs/r/checkpoints", "identity", minutes=0.0001)
    with caplog.at_level(logging.INFO):
        checkpoints.save(3, {"weights/0": np.zeros(2)}, {"epoch": 1})
    assert "no checkpoint could be written; training goes on without" in caplog.text
    assert "checkpoint at step" not in caplog.text
