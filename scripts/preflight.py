"""What this machine must have, checked before anything is installed or started.

    python3 scripts/preflight.py    before the installation: Python, venv, disk

Runs on a bare system's Python, whichever that is: standard library only, and nothing newer than Python 3.6.
"""

import importlib.util
import shutil
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIGABYTE = 1_000_000_000
INSTALL_SPACE = 6 * GIGABYTE  # TensorFlow, Airflow and the package cache
RUN_SPACE = GIGABYTE
RUN_MEMORY = 2 * GIGABYTE


class NotReadyError(Exception):
    """One sentence: what is missing and what to do about it."""


def check_install() -> None:
    """Whether this Python and disk can take the installation. Raises `NotReadyError`."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise NotReadyError(
            f"Python 3.11 or 3.12 is needed, and {sys.executable} is {found}: install one of them, or name it with "
            f"`make PYTHON=/path/to/python3.11`."
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise NotReadyError(
            f"{sys.executable} cannot make a virtual environment: install python{sys.version_info[0]}."
            f"{sys.version_info[1]}-venv (Debian, Ubuntu: sudo apt-get install python3-venv)."
        )
    check_space(INSTALL_SPACE, "install the libraries")


def check_run(ports: dict) -> None:
    """Whether the local stack can start; `ports` is `{port: (what it is for, variable that changes it)}`.

    Raises `NotReadyError`.
    """
    for port, (purpose, variable) in ports.items():
        check_port(port, purpose, variable)
    check_space(RUN_SPACE, "run")
    check_memory()


def check_port(port: int, purpose: str, variable: str) -> None:
    """Whether nobody listens on a port of the loopback interface. Raises `NotReadyError`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise NotReadyError(
                f"Port {port}, which is for {purpose}, cannot be used ({error.strerror}): stop what uses it, or choose "
                f"another with {variable}=PORT."
            ) from error


def check_space(needed: int, purpose: str) -> None:
    """Whether the disk has room. Raises `NotReadyError`."""
    free = shutil.disk_usage(str(ROOT)).free
    if free < needed:
        raise NotReadyError(
            f"{free / GIGABYTE:.1f} GB are free in {ROOT}, and {needed / GIGABYTE:.0f} GB are needed to {purpose}: "
            f"make room."
        )


def check_memory() -> None:
    """Whether Airflow and a step have room in memory; asked only where /proc/meminfo tells. Raises `NotReadyError`."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return
    if available < RUN_MEMORY:
        raise NotReadyError(
            f"{available / GIGABYTE:.1f} GB of memory are available, and Airflow and a training step need "
            f"{RUN_MEMORY / GIGABYTE:.0f} GB: close other programs."
        )


if __name__ == "__main__":
    try:
        check_install()
    except NotReadyError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
