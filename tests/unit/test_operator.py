"""The operators that run a step: the command, the outcome, and the end of a step that is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout
from hypothesis import given
from hypothesis import strategies as st

from plugins.pipelines import run_id
from plugins.retrain_operator import (
    Command,
    LocalStep,
    RollBack,
    changed_settings,
    report_result,
    step_arguments,
    step_environment,
)
from tasks import registry
from tasks.errors import DataError
from tasks.run import Run
from tasks.storage import Store

PIPELINES = st.from_regex(r"[a-z0-9]+(-[a-z0-9]+)*", fullmatch=True)


# The name of a run


@given(PIPELINES, st.text())
def test_a_run_has_one_name_that_is_safe_in_a_key(pipeline: str, dag_run_id: str) -> None:
    name = run_id(pipeline, dag_run_id)
    assert name == run_id(pipeline, dag_run_id)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
    assert name.startswith(pipeline)
    assert len(name) < len(pipeline) + 120


@given(st.lists(st.tuples(PIPELINES, st.text()), min_size=2, unique=True))
def test_two_runs_never_share_a_name(runs: list[tuple[str, str]]) -> None:
    assert len({run_id(*run) for run in runs}) == len(runs)


def test_names_of_runs_that_look_alike() -> None:
    alike = [
        "manual__2026-11-24T03:28:29+00:00",
        "manual__2026-11-24T03-28-29-00-00",
        "manual__2026-11-24T03:28:29-00:00",
    ]
    names = {run_id("demo", each) for each in alike}
    assert len(names) == 3
    assert all(name.startswith("demo-manual__2026-11-24T03-28-29-00-00-") for name in names)


# The command


def context(params: dict[str, Any] | None = None, defaults: dict[str, Any] | None = None) -> Any:
    """What Airflow hands to an operator, as far as a step looks at it."""
    return {
        "params": params or {},
        "dag": SimpleNamespace(params=defaults or {}),
        "ti": SimpleNamespace(dag_id="retrain_demo"),
        "outlet_events": OutletEvents(),
    }


class OutletEvents(dict[Any, Any]):
    """Airflow's accessor makes an entry for each asset that is asked for."""

    def __missing__(self, asset: Any) -> Any:
        self[asset] = SimpleNamespace(extra={})
        return self[asset]


def test_configure_is_told_the_file_and_the_changes() -> None:
    arguments = step_arguments(
        "configure",
        "s3://b/runs/r",
        "config/demo.yaml",
        context({"training.epochs": 1, "data.revision": None, "force": False}, {"training.epochs": 3, "force": False}),
    )
    assert arguments == [
        *["configure", "--run", "s3://b/runs/r", "--pipeline", "config/demo.yaml"],
        *["--set", "training.epochs=1", "--set", "data.revision=null"],
    ]


def test_other_steps_read_the_settings_from_the_run() -> None:
    assert step_arguments("train", "s3://b/runs/r", None, context({"force": True})) == [
        "train",
        "--run",
        "s3://b/runs/r",
    ]


def test_a_setting_that_nobody_knows_is_passed_on_to_be_refused() -> None:
    assert changed_settings({"trianing.epochs": 1}, {"training.epochs": 3}) == {"trianing.epochs": 1}


def test_steps_do_not_see_airflows_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "secret")
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "client")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "needed")
    environment = step_environment()
    assert not [name for name in environment if "AIRFLOW" in name]
    assert environment["AWS_ACCESS_KEY_ID"] == "needed"


# The outcome, with real steps


def local(step: str, uri: str, **kwargs: Any) -> LocalStep:
    return LocalStep(task_id=step, step=step, run_uri=uri, **kwargs)


def test_a_step_that_succeeds_returns_its_result(store: Store) -> None:
    uri = f"s3://{store.bucket}/runs/r"
    model = Asset(name="model", uri="s3://b/models/m/production.json")
    surroundings = context({"training.epochs": 2})
    result = local("configure", uri, pipeline_file="config/demo.yaml", outlets=[model]).execute(surroundings)
    assert result == store.get_json("runs/r/results/configure.json")
    assert store.get_json("runs/r/config.json")["settings"]["training"]["epochs"] == 2
    assert surroundings["outlet_events"][model].extra == {"run": uri, "pointer": model.uri, "metrics": None, **result}
    json.dumps(result)


def test_bad_settings_are_not_tried_again(store: Store) -> None:
    operator = local("configure", f"s3://{store.bucket}/runs/r", pipeline_file="config/demo.yaml")
    with pytest.raises(AirflowFailException, match=r"^configure: config/demo.yaml: training.epochs: .*found 'many'$"):
        operator.execute(context({"training.epochs": "many"}))
    with pytest.raises(AirflowFailException, match="trianing: is not a setting"):
        operator.execute(context({"trianing.epochs": 1}))


def test_a_step_out_of_order_says_which_is_missing(store: Store) -> None:
    with pytest.raises(AirflowFailException, match="has no result of the gate step: run it first"):
        local("reject", f"s3://{store.bucket}/runs/never").execute(context())


def test_a_command_line_that_is_refused_is_not_tried_again() -> None:
    with pytest.raises(AirflowFailException, match=r"nonsense: .*invalid choice"):
        local("nonsense", "s3://b/runs/r").execute(context())


@pytest.mark.parametrize(
    ("code", "retried"), [(1, True), (75, True), (137, True), (2, False), (65, False), (78, False)]
)
def test_which_exit_codes_are_tried_again(code: int, retried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStep, "_run", lambda *_: (code, "the last line"))
    with pytest.raises(AirflowException, match="the last line") as caught:
        local("train", "s3://b/runs/r").execute(context())
    assert isinstance(caught.value, AirflowFailException) is not retried


def test_a_step_that_was_killed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStep, "_run", lambda *_: (-signal.SIGKILL, ""))
    with pytest.raises(AirflowException, match="train was stopped by SIGKILL: the machine may have run out of memory"):
        local("train", "s3://b/runs/r").execute(context())


def test_a_command_needs_no_run_and_fails_as_a_step_does(store: Store, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for version in ("1", "2"):
        (tmp_path / "old" / "config.json").write_text(version)
        registry.publish(store, "m", version, tmp_path / "old", {})
    prune = ["models", "prune", "m", "--bucket", store.bucket, "--keep"]
    for arguments, left in (([*prune, "1", "--dry-run"], ["1", "2"]), ([*prune, "1", ""], ["2"])):
        Command(task_id="prune", arguments=arguments).execute(context())
        assert registry.versions(store, "m") == left
    with pytest.raises(AirflowFailException, match=r"models: .*invalid _positive value: '0'"):
        Command(task_id="prune", arguments=[*prune, "0"]).execute(context())


# The store, by an Airflow connection


@pytest.fixture
def by_connection(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A bucket whose address and key are in an Airflow connection, and not in the environment."""
    said = {name: os.environ[name] for name in ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in said:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_REGION", "a-region")  # is put back when the connection has changed it
    connection = {
        "conn_type": "aws",
        "login": said["AWS_ACCESS_KEY_ID"],
        "password": said["AWS_SECRET_ACCESS_KEY"],
        "extra": {"endpoint_url": said["S3_ENDPOINT_URL"], "region_name": "eu-central-1"},
    }
    monkeypatch.setenv("AIRFLOW_CONN_STORE", json.dumps(connection))
    monkeypatch.setenv("RETRAIN_STORE_CONN_ID", "store")
    return bucket


def test_a_step_reaches_the_store_by_a_connection_whose_key_nobody_sees(
    by_connection: Store, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    uri = f"s3://{by_connection.bucket}/runs/by-connection"
    result = local("configure", uri, pipeline_file="config/demo.yaml").execute(context())
    assert result == by_connection.get_json("runs/by-connection/results/configure.json")
    assert os.environ["AWS_REGION"] == "eu-central-1"
    secret = json.loads(os.environ["AIRFLOW_CONN_STORE"])["password"]
    stored = [by_connection.get(entry.key).decode() for entry in by_connection.list("runs/by-connection/")]
    shown = "".join([caplog.text, *stored, json.dumps(result), *capfd.readouterr()])
    assert "configure: done in" in shown
    assert secret not in shown


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        (None, "RETRAIN_STORE_CONN_ID is 'store', and there is no such connection"),
        ({"extra": {"verify": False}}, "'store' has False where text for AWS_CA_BUNDLE was expected"),
    ],
)
def test_a_connection_that_cannot_be_used_is_not_tried_again(
    connection: dict[str, Any] | None, message: str, monkeypatch: pytest.MonkeyPatch, airflow_database: None
) -> None:
    monkeypatch.setenv("RETRAIN_STORE_CONN_ID", "store")
    if connection:
        monkeypatch.setenv("AIRFLOW_CONN_STORE", json.dumps({"conn_type": "aws", **connection}))
    with pytest.raises(AirflowFailException, match=message):
        local("configure", "s3://b/runs/r", pipeline_file="config/demo.yaml").execute(context())


# The process, with real processes


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_output_reaches_the_log_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[float, str]] = []
    log = SimpleNamespace(info=lambda form, *values: lines.append((time.monotonic(), form % values)))
    monkeypatch.setattr(LocalStep, "log", log)
    program = r"""
import sys, time
print("one")
time.sleep(1)
print("two", file=sys.stderr)
sys.stdout.buffer.write(b"\xff 100%")
"""
    assert local("train", "s3://b/runs/r")._run(python(program), str(tmp_path)) == (0, "\ufffd 100%")
    assert [line for _, line in lines] == ["one", "two", "\ufffd 100%"]
    assert lines[1][0] - lines[0][0] > 0.8


def running(pattern: str) -> list[psutil.Process]:
    """The processes with this on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if pattern in " ".join(process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_{parent})
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_{child}); time.sleep(99)  # {mark}"
subprocess.Popen([sys.executable, "-c", child])
time.sleep({seconds})  # {mark}
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_stopping_a_task_ends_the_step_and_its_children(stubborn: bool, tmp_path: Path) -> None:
    mark = f"stopped-{os.getpid()}-{stubborn}"
    reaction = "IGN" if stubborn else "DFL"
    program = FAMILY.format(parent=reaction, child=reaction, mark=mark, seconds=99)
    operator = local("train", "s3://b/runs/r")
    outcome: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: outcome.append(operator._run(python(program), str(tmp_path))))
    thread.start()
    wait_for(lambda: len(running(mark)) == 2)
    time.sleep(0.3)
    started = time.monotonic()
    operator.on_kill()
    thread.join(5)
    assert time.monotonic() - started < 4.5  # Airflow kills the task itself after five seconds
    assert outcome[0][0] == -(signal.SIGKILL if stubborn else signal.SIGTERM)
    wait_for(lambda: not running(mark), 2)


def test_a_child_that_outlives_the_step_does_not_hold_the_task(tmp_path: Path) -> None:
    mark = f"orphan-{os.getpid()}"
    program = FAMILY.format(parent="DFL", child="IGN", mark=mark, seconds=0.5)
    started = time.monotonic()
    code, _ = local("train", "s3://b/runs/r")._run(python(program), str(tmp_path))
    assert code == 0
    assert time.monotonic() - started < 5
    wait_for(lambda: not running(mark), 2)


def test_a_timeout_ends_the_step(tmp_path: Path) -> None:
    """Airflow raises in the middle of `execute`, then calls `on_kill`."""
    mark = f"timeout-{os.getpid()}"
    operator = local("train", "s3://b/runs/r")

    def expire(*_: Any) -> None:
        raise AirflowTaskTimeout

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(AirflowTaskTimeout):
            operator._run(python(f"import time; time.sleep(99)  # {mark}"), str(tmp_path))
    finally:
        signal.signal(signal.SIGALRM, before)
    operator.on_kill()
    wait_for(lambda: not running(mark), 5)


def test_stopping_before_anything_has_started_is_no_error() -> None:
    local("train", "s3://b/runs/r").on_kill()


def test_a_result_that_is_not_there_is_an_error(store: Store) -> None:
    operator = SimpleNamespace(run_uri=f"s3://{store.bucket}/runs/r", step="train", outlets=[])
    with pytest.raises(DataError, match="has no result of the train step"):
        report_result(operator, context())
    Run.at(operator.run_uri).save_result("train", {"summary": "done"})
    assert report_result(operator, context()) == {"summary": "done"}


# Rolling back, with real processes


@pytest.fixture
def versions(store: Store, tmp_path: Path) -> Store:
    """A model with the versions 1, 2 and 3, of which the last is in production."""
    (tmp_path / "weights").write_text("w")
    for number, before in ("1", None), ("2", "1"), ("3", "2"):
        registry.publish(store, "demo", number, tmp_path, {})
        registry.move(store, "demo", number, expected=before, who="a run", why="better")
    return store


def roll_back(version: str, asked: datetime) -> dict[str, Any]:
    operator = RollBack(task_id="rollback", model="demo", version=version, why="it insults customers")
    return operator.execute({**context(), "dag_run": SimpleNamespace(run_after=asked, triggering_user_name="ana")})


def test_rolling_back_moves_production_once_however_often_it_is_run(versions: Store) -> None:
    asked = datetime.now(UTC)
    event = roll_back("1", asked)
    assert (event["number"], event["version"], event["who"], event["why"]) == (4, "1", "ana", "it insults customers")
    assert roll_back("1", asked) == event
    assert len(registry.history(versions, "demo")) == 4


def test_rolling_back_that_is_cleared_does_not_undo_what_came_after(versions: Store) -> None:
    asked = datetime.now(UTC)
    roll_back("1", asked)
    registry.move(versions, "demo", "3", expected="1", who="a run", why="better")
    with pytest.raises(AirflowFailException, match="production of demo has moved to 3 since this was asked for"):
        roll_back("1", asked)
    assert registry.resolve(versions, "demo", registry.PRODUCTION) == "3"
