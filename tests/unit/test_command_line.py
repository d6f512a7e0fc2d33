"""The command line where no step does any work: what is refused, the exit code, and the one sentence left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import tasks
from tasks.__main__ import STEPS, main
from tasks.configure import code_version
from tasks.errors import NEVER_RETRY, DataError, RetryableError, SettingsError, StepError
from tasks.run import Run
from tasks.settings import form_fields, load
from tasks.storage import MissingObjectError, Store, StoreRefusedError, StoreUnreachableError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "config" / "demo.yaml"


@pytest.fixture
def reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which Kubernetes looks for a pod's last words."""
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setenv("RETRAIN_TERMINATION_LOG", str(path))
    return path


def refused(pipeline: Path) -> int:
    """The exit code of a configure step that gets no further than the pipeline's file."""
    return main(["configure", "--run", "s3://b/runs/r", "--pipeline", str(pipeline)])


@pytest.mark.parametrize(
    ("error", "code", "retried"),
    [
        (StepError, 1, True),
        (MissingObjectError, 1, True),
        (RetryableError, 75, True),
        (StoreUnreachableError, 75, True),
        (DataError, 65, False),
        (SettingsError, 78, False),
        (StoreRefusedError, 78, False),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(error: type[StepError], code: int, retried: bool) -> None:
    assert error.exit_code == code
    assert (code not in NEVER_RETRY) == retried


@pytest.mark.parametrize(
    "arguments",
    [[], ["tarin"], ["train"], ["configure", "--run", "s3://b/runs/r"], ["models"], ["models", "burn", "m"]],
)
def test_a_command_line_that_is_none_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m tasks" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], *([step, "--help"] for step in STEPS), ["mirror", "--help"]])
def test_help_is_at_hand(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert all(purpose in words for step, purpose in STEPS.items() if arguments[0] in {"--help", step})


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == tasks.__version__


def test_every_setting_is_listed_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--pipeline", str(DEMO)]) == 0
    listed = capsys.readouterr().out.splitlines()
    fields = form_fields(load(DEMO))
    assert [line.split(" = ")[0] for line in listed[::2]] == list(fields)
    assert listed[1::2] == [f"    {field['description']}" for field in fields.values()]


# The one sentence


def test_a_reason_of_many_lines_is_left_as_one(tmp_path: Path, reason: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: [\nb: }\n")
    assert refused(tmp_path / "p.yaml") == 78
    assert reason.read_text().startswith(f"{tmp_path}/p.yaml: cannot be read as YAML: while parsing")
    assert "\n" not in reason.read_text()


def test_the_reason_is_as_long_as_kubernetes_takes(tmp_path: Path, reason: Path) -> None:
    (tmp_path / "p.yaml").write_text("\n".join(f"unknown{number}: 1" for number in range(1000)))
    assert refused(tmp_path / "p.yaml") == 78
    assert len(reason.read_text()) == 4096


def test_a_reason_replaces_the_one_of_an_earlier_try(tmp_path: Path, reason: Path) -> None:
    reason.write_text("an earlier try " * 100)
    assert refused(tmp_path / "none.yaml") == 78
    assert reason.read_text().startswith(f"{tmp_path}/none.yaml: cannot be read as YAML: ")
    assert "earlier" not in reason.read_text()


def test_a_name_that_is_no_text_does_not_hide_the_reason(tmp_path: Path, reason: Path) -> None:
    assert refused(tmp_path / os.fsdecode(b"\xff.yaml")) == 78
    assert "cannot be read as YAML" in reason.read_text()


@pytest.mark.parametrize("place", ["a folder", "nowhere"])
def test_a_reason_that_cannot_be_left_does_not_change_the_exit_code(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path if place == "a folder" else tmp_path / "none"
    monkeypatch.setenv("RETRAIN_TERMINATION_LOG", str(path))
    assert refused(tmp_path / "none.yaml") == 78
    assert "ERROR: " in caplog.text
    assert not (tmp_path / "none").exists()  # it is Kubernetes that makes the file


def test_the_command_ends_with_the_exit_code_and_without_a_traceback(tmp_path: Path, reason: Path) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "tasks",
            "configure",
            "--run",
            "s3://b/runs/r",
            "--pipeline",
            str(tmp_path / "none.yaml"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == SettingsError.exit_code
    assert "Traceback" not in ended.stderr
    assert ended.stderr.rstrip().endswith(f"ERROR: {reason.read_text()}")


@pytest.fixture
def silent() -> Iterator[tuple[str, threading.Event]]:
    """A server that accepts and never answers: its address, and whether somebody has asked."""
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            connection, _ = server.accept()
            asked.set()
            while connection.recv(1024):
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


def test_a_step_that_is_interrupted_ends_with_130_and_without_a_traceback(
    silent: tuple[str, threading.Event], reason: Path
) -> None:
    endpoint, asked = silent
    environment = {"S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "a-secret"}
    with subprocess.Popen(
        [sys.executable, "-m", "tasks", "models", "list", "demo"],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert reason.read_text() == ""


# The run


@pytest.mark.parametrize("name", ["r", "demo-manual__2026-11-24T03-28-29-00-00-a1b2c3d4", "r#1", "r?x=1", "a b"])
def test_a_runs_address_is_read_to_its_end(name: str) -> None:
    run = Run.at(f"s3://bucket/runs/{name}")
    assert (run.id, run.uri, run.key("x")) == (name, f"s3://bucket/runs/{name}", f"runs/{name}/x")
    assert Run.at(f"s3://bucket/runs/{name}/").id == name


def test_a_result_is_read_by_other_processes(bucket: Store) -> None:
    uri = f"s3://{bucket.bucket}/runs/r"
    early = Run.at(uri)
    assert early.find_result("train") is None
    Run.at(uri).save_result("train", {"summary": "done"})
    assert early.result("train") == {"summary": "done"}  # that it was not there is not remembered


@pytest.mark.parametrize("file", ["config.json", "results/gate.json"])
def test_a_file_of_a_run_that_is_damaged_is_named(file: str, bucket: Store, reason: Path) -> None:
    uri = f"s3://{bucket.bucket}/runs/damaged-{len(file)}"
    bucket.put(f"{Run.at(uri).prefix}/{file}", b'{"cut')
    step = {"config.json": "pull", "results/gate.json": "reject"}[file]
    assert main([step, "--run", uri]) == DataError.exit_code
    assert reason.read_text().startswith(f"{uri}/{file} is damaged: it is not JSON")


# The code's version


def test_a_run_has_a_version_of_the_code_even_where_there_is_no_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RETRAIN_COMMIT", "805090d")
    assert code_version() == "805090d"
    monkeypatch.setenv("RETRAIN_COMMIT", "")  # an image that was built without saying
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version() == tasks.__version__
