"""Prepared data, as the steps after `preprocess` read it."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict

from tasks import artifacts
from tasks.run import Run


def fetch_prepared(run: Run, scratch: Path) -> DatasetDict:
    """The run's tokenised splits, verified and memory-mapped from `scratch`."""
    directory = scratch / "prepared"
    artifacts.fetch(run.store, run.result("preprocess")["prepared"], directory)
    return DatasetDict.load_from_disk(directory)
