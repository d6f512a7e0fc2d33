"""The local stack's parts that need no Airflow: the checks before a start, and processes in the background."""

from __future__ import annotations

import ast
import os
import socket
import stat
import sys
import time
from pathlib import Path

import pytest

from scripts import object_store, preflight
from scripts.preflight import NotReadyError
from scripts.processes import Background, lives
from scripts.stack import Stack, environment, write_private

ROOT = Path(__file__).resolve().parents[2]


# Before a start


def test_the_checks_can_be_read_by_an_old_python() -> None:
    """Whoever has only an old Python is to read a sentence, not a syntax error."""
    ast.parse((ROOT / "scripts" / "preflight.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 9, 2), (3, 10, 13), (3, 13, 0)])
def test_another_python_is_refused(version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(
        NotReadyError, match=r"^Python 3\.11 or 3\.12 is needed, and .* is " + f"{version[0]}.{version[1]}"
    ):
        preflight.check_install()


def test_a_python_without_venv_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NotReadyError, match=r"install python3\.\d+-venv"):
        preflight.check_install()


def test_a_port_in_use_is_named_with_the_variable_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NotReadyError, match=f"Port {port}, which is for Airflow, .*RETRAIN_AIRFLOW_PORT=PORT"):
            preflight.check_run({port: ("Airflow", "RETRAIN_AIRFLOW_PORT")})
    preflight.check_run({port: ("Airflow", "RETRAIN_AIRFLOW_PORT")})


def test_a_wrong_minio_binary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINIO_BINARY", str(tmp_path / "minio"))
    with pytest.raises(NotReadyError, match=r"MINIO_BINARY is '.*/minio', which is no program.*correct it, or unset"):
        object_store.find_minio()


def test_too_little_space_is_refused() -> None:
    with pytest.raises(NotReadyError, match=r"GB are free in .*, and 1000000 GB are needed to run: make room"):
        preflight.check_space(1_000_000 * preflight.GIGABYTE, "run")


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "RUN_MEMORY", 1_000_000 * preflight.GIGABYTE)
    with pytest.raises(NotReadyError, match="GB of memory are available"):
        preflight.check_memory()


@pytest.mark.parametrize("value", ["abc", "80", "70000", "-1"])
def test_a_port_that_is_none_is_refused(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRAIN_STORE_PORT", value)
    with pytest.raises(NotReadyError, match=f"RETRAIN_STORE_PORT is '{value}'"):
        _ = Stack(tmp_path).ports


# Settings and secrets


def test_secrets_are_made_once_and_for_their_owner_only(tmp_path: Path) -> None:
    first = Stack(tmp_path).secrets
    assert Stack(tmp_path).secrets == first
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    write_private(tmp_path / "secrets.json", "{}")
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600


def test_an_object_store_that_is_there_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"S3_ENDPOINT_URL": "https://s3.example", "AWS_PROFILE": "mine"}.items():
        monkeypatch.setenv(name, value)
    stack = Stack(tmp_path)
    assert stack.store is None
    assert stack.environment["S3_ENDPOINT_URL"] == "https://s3.example"
    assert stack.environment["AWS_PROFILE"] == "mine"


def test_our_own_object_store_is_not_asked_with_another_ones_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "another's")
    stack = Stack(tmp_path)
    assert "another's" not in stack.environment.values()
    with environment(stack.environment):
        assert "AWS_PROFILE" not in os.environ
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == stack.secrets["store"]["secret_key"]
    assert os.environ["AWS_PROFILE"] == "another's"


# Processes


def start(background: Background, name: str, program: str) -> None:
    background.start(name, [sys.executable, "-c", program], os.environ, ROOT)


def test_a_process_is_found_and_stopped_by_whoever_comes_later(tmp_path: Path) -> None:
    start(Background(tmp_path), "one", "import time; print('hello', flush=True); time.sleep(99)")
    later = Background(tmp_path)
    assert later.find("one")
    assert later.find("another") is None
    deadline = time.monotonic() + 10
    while not later.last_lines("one") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert later.last_lines("one") == "hello"
    assert later.stop(["one", "another"]) == ["one"]
    assert later.find("one") is None
    assert later.stop(["one"]) == []


def test_what_a_process_started_is_stopped_with_it(tmp_path: Path) -> None:
    """Even in a group of its own, as Airflow's tasks are, and deaf to SIGTERM."""
    program = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(99)"
subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
time.sleep(99)
"""
    background = Background(tmp_path)
    start(background, "parent", program)
    deadline = time.monotonic() + 10
    while background.last_lines("parent") != "ready" and time.monotonic() < deadline:
        time.sleep(0.05)
    parent = background.find("parent")
    assert parent
    (child,) = parent.children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.processes.PATIENCE", 1)
        background.stop(["parent"])
    assert not lives(child)


def test_a_number_that_now_belongs_to_another_process_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids" / "one").write_text(f"{os.getpid()} 1.0")
    background = Background(tmp_path)
    assert background.find("one") is None
    assert background.stop(["one"]) == []
