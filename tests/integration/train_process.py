"""The train step as a process that a test may kill, without the seconds that importing TensorFlow takes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tasks.__main__ import main


def start(uri: str, log: Path) -> ForkServerProcess:
    """Start `python -m tasks train --run URI`, in this process's environment; its log is appended to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.train"])
    process = context.Process(target=_train, args=(uri, log, dict(os.environ)))
    process.start()
    return process


def _train(uri: str, log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(["train", "--run", uri]))
