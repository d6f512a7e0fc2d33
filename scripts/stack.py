"""The local stack: an object store and Airflow on loopback, everything they keep in `.retrain/`.

    .retrain/secrets.json    the store's key, Airflow's keys, the UI's password; made once, readable by its owner only
    .retrain/store/          the object store's data
    .retrain/airflow/        AIRFLOW_HOME: the database, the tasks' logs
    .retrain/logs/, pids/    one a process

To start afresh, stop it and delete the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts import airflow_settings, object_store, preflight
from scripts.airflow_api import AirflowApi
from scripts.processes import Background
from tasks.errors import StepError
from tasks.storage import Store, StoreRefusedError

ROOT = Path(__file__).resolve().parent.parent
STORE = "object-store"
ALL = [STORE, *airflow_settings.COMPONENTS]
START_UP = 120.0  # seconds that Airflow may take to be healthy; a slow machine needs 40


class StackError(Exception):
    """Something that was started does not run. The message says which, and what it said last."""


class Stack:
    """The processes of the local stack, whether they run or not."""

    def __init__(self, folder: Path = ROOT / ".retrain") -> None:
        self.folder = folder
        self.bucket = os.environ.get("RETRAIN_BUCKET", "retrain")
        self._background = Background(folder)

    @cached_property
    def secrets(self) -> dict[str, Any]:
        """Made at the first start, and the same ever after: the data was written under them."""
        path = self.secrets_file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            credentials = object_store.Credentials.random()
            content = {
                "store": {"access_key": credentials.access_key, "secret_key": credentials.secret_key},
                "airflow": airflow_settings.new_secrets(),
            }
            write_private(path, json.dumps(content, indent=2))
        return json.loads(path.read_text())

    @cached_property
    def ports(self) -> dict[str, int]:
        """The ports that it runs on, or would."""
        with contextlib.suppress(OSError, ValueError):
            if self.running():
                return json.loads((self.folder / "ports.json").read_text())
        store = _port("RETRAIN_STORE_PORT", 9000)
        return {"airflow": _port("RETRAIN_AIRFLOW_PORT", 8080), "store": store, "console": store + 1}

    @cached_property
    def store(self) -> object_store.Server | None:
        """The object store to start; None when `S3_ENDPOINT_URL` names one that is there already."""
        if os.environ.get("S3_ENDPOINT_URL"):
            return None
        kind = "minio" if object_store.find_minio() else "ministack"
        return object_store.server(
            kind,
            self.folder / "store" / kind,
            self.ports["store"],
            object_store.Credentials(**self.secrets["store"]),
            console_port=self.ports["console"],
        )

    @property
    def secrets_file(self) -> Path:
        """Where the store's key is."""
        return self.folder / "secrets.json"

    @property
    def url(self) -> str:
        """Airflow's address."""
        return f"http://{airflow_settings.HOST}:{self.ports['airflow']}"

    @property
    def home(self) -> Path:
        """AIRFLOW_HOME."""
        return self.folder / "airflow"

    @property
    def password_file(self) -> Path:
        """Where the password of the UI's user `admin` is."""
        return self.home / "passwords.json"

    @cached_property
    def environment(self) -> dict[str, str]:
        """What Airflow, the steps and every client of the store have in their environment."""
        # Another Airflow's settings would mix with ours.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
        if self.store:
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):  # of another store, and they would be used first
                environment.pop(name, None)
            environment |= self.store.client_environment
        not_by_proxy = ",".join(filter(None, ["127.0.0.1,localhost", environment.get("NO_PROXY")]))
        return (
            environment
            | airflow_settings.environment(
                self.home, self.secrets["airflow"], port=self.ports["airflow"], bucket=self.bucket
            )
            | {"NO_PROXY": not_by_proxy, "no_proxy": not_by_proxy}
        )

    def api(self) -> AirflowApi:
        """A client of the running Airflow."""
        return AirflowApi(self.url, airflow_settings.ADMIN, self.secrets["airflow"]["password"])

    def running(self) -> list[str]:
        """The names of the processes that run."""
        return [name for name in ALL if self._background.find(name)]

    def up(self, say: Callable[[str], None], extra: dict[str, str] | None = None) -> list[str]:
        """Start what does not run, and return the names of what was started, once all of it is ready.

        `extra` is added to the environment of Airflow's components. Raises `NotReadyError` before anything is started,
        `StackError` when something does not come up; then what was started has been stopped.
        """
        running = self.running()
        missing = [name for name in ALL if name not in running and (name != STORE or self.store)]
        if not missing:
            return []
        if not running:
            preflight.check_run(self._wanted_ports())
        started: list[str] = []
        try:
            self._prepare()
            if STORE in missing:
                self._start_store(say, started)
            self._find_or_create_bucket()
            self._migrate(say)
            say("Airflow starts ...")
            for name, command in airflow_settings.COMPONENTS.items():
                if name in missing:
                    started.append(name)
                    self._start(name, [sys.executable, "-m", "airflow", *command], self.environment | (extra or {}))
            self._wait_until_healthy()
        except BaseException:
            self._background.stop(started)
            raise
        return started

    def down(self, names: list[str] | None = None) -> list[str]:
        """Stop what runs, the store last; returns the names."""
        names = ALL if names is None else names
        stopped = self._background.stop([name for name in names if name != STORE])
        return stopped + self._background.stop([name for name in names if name == STORE])

    def _wanted_ports(self) -> dict[int, tuple[str, str]]:
        wanted = {self.ports["airflow"]: ("Airflow", "RETRAIN_AIRFLOW_PORT")}
        if self.store:
            wanted[self.ports["store"]] = ("the object store", "RETRAIN_STORE_PORT")
            if self.store.kind == "minio":
                wanted[self.ports["console"]] = ("the object store's web page", "RETRAIN_STORE_PORT")
        return wanted

    def _prepare(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        (self.folder / "ports.json").write_text(json.dumps(self.ports))
        # Written here because Airflow would print the one that it makes.
        write_private(self.password_file, json.dumps({airflow_settings.ADMIN: self.secrets["airflow"]["password"]}))

    def _start_store(self, say: Callable[[str], None], started: list[str]) -> None:
        assert self.store  # noqa: S101  (for the type checker)
        say(f"The object store starts ({self.store.kind}) ...")
        started.append(STORE)
        process = self._start(STORE, self.store.command, {**os.environ, **self.store.environment})
        try:
            self.store.wait_until_ready(process)
        except RuntimeError as error:
            raise self._failure(STORE, str(error)) from error

    def _find_or_create_bucket(self) -> None:
        with environment(self.environment):
            store = Store(self.bucket)
            try:
                try:
                    next(store.list("models/"), None)
                except StoreRefusedError:  # only now: who may use a bucket is not always allowed to make one
                    store.create_bucket()
            except StepError as error:
                raise StackError(f"The bucket {self.bucket!r} cannot be used: {error}") from error

    def _migrate(self, say: Callable[[str], None]) -> None:
        """Make or update Airflow's database, once for each version of Airflow: looking takes five seconds."""
        stamp = self.home / "database-version"
        if stamp.exists() and stamp.read_text() == version("apache-airflow"):
            return
        say("Airflow's database is made ...")
        process = self._start("migrate", [sys.executable, "-m", "airflow", "db", "migrate"], self.environment)
        try:
            if process.wait() != 0:
                raise self._failure("migrate", "Airflow's database cannot be made")
        finally:
            self._background.stop(["migrate"])
        stamp.write_text(version("apache-airflow"))

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_UP
        while waiting := self.api().unhealthy():
            for name in airflow_settings.COMPONENTS:
                if not self._background.find(name):
                    raise self._failure(name, f"Airflow's {name} ended before it was ready")
            if time.monotonic() > deadline:
                raise self._failure(
                    "api-server",
                    f"Airflow was not ready within {START_UP:.0f} s; still waiting for {', '.join(waiting)}",
                )
            time.sleep(0.3)

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return self._background.start(name, command, environment, ROOT)

    def _failure(self, name: str, what: str) -> StackError:
        log = self._background.log(name)
        return StackError(f"{what}. The end of {log}:\n{self._background.last_lines(name)}")


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Have this environment, and no other, in this process for a while: `tasks.storage` looks there."""
    before = dict(os.environ)
    try:
        _replace_environment(variables)
        yield
    finally:
        _replace_environment(before)


def _replace_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def write_private(path: Path, content: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)


def _port(variable: str, default: int) -> int:
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal() or not 1024 <= int(value) <= 65535:
        raise preflight.NotReadyError(f"{variable} is {value!r}: expected a port from 1024 to 65535.")
    return int(value)
