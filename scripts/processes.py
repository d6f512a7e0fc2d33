"""Processes in the background that outlive the command that started them, found again by their pid files."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

PATIENCE = 10.0  # seconds that a process may take to end before it is killed


class Background:
    """The background processes of one folder: `pids/NAME` and `logs/NAME.log`."""

    def __init__(self, folder: Path) -> None:
        self._pids = folder / "pids"
        self._logs = folder / "logs"

    def start(
        self, name: str, command: list[str], environment: Mapping[str, str], cwd: Path
    ) -> subprocess.Popen[bytes]:
        """Start a process that a terminal's Ctrl-C does not reach, with its output in its log."""
        for folder in (self._pids, self._logs):
            folder.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # The time tells the process from a later one with the same number.
        (self._pids / name).write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")
        return process

    def find(self, name: str) -> psutil.Process | None:
        """A process that was started and still runs."""
        try:
            pid, created = (self._pids / name).read_text().split()
            process = psutil.Process(int(pid))
            return process if abs(process.create_time() - float(created)) < 2 and lives(process) else None
        except (OSError, ValueError, psutil.Error):
            return None

    def stop(self, names: list[str]) -> list[str]:
        """End processes and everything that they started; returns the names of those that ran."""
        found = {name: process for name in names if (process := self.find(name))}
        family = list(found.values())
        for process in found.values():
            with contextlib.suppress(psutil.Error):
                family += process.children(recursive=True)  # noted now: an orphan's parent cannot be told later
        impatience = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave half of them running
        try:
            for action in ("terminate", "kill"):
                for process in filter(lives, family):
                    with contextlib.suppress(psutil.Error):
                        getattr(process, action)()
                deadline = time.monotonic() + PATIENCE
                while any(map(lives, family)) and time.monotonic() < deadline:
                    time.sleep(0.1)
        finally:
            signal.signal(signal.SIGINT, impatience)
        for name in names:
            (self._pids / name).unlink(missing_ok=True)
        return list(found)

    def log(self, name: str) -> Path:
        """Where a process's output is."""
        return self._logs / f"{name}.log"

    def last_lines(self, name: str, count: int = 15) -> str:
        """The end of a process's output."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-count:])
        return ""


def lives(process: psutil.Process) -> bool:
    """Whether a process runs. One that has ended and that nobody has asked about, as in a container, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
