"""The operators that run a step of a pipeline, and the choice between them.

A step is a program, `python -m tasks STEP --run s3://BUCKET/runs/RUN_ID`, whatever runs it. `RETRAIN_RUNNER` says what
does: `local`, a process of the Airflow worker (`LocalStep`, here), or `kubernetes`, a pod (`PodStep`, in
`retrain_pod.py`, which is imported only then). Both end with what the step left in the store as their XCom.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from plugins import metrics
from plugins.links import LINKS, PodLink
from plugins.pipelines import ROOT, bucket
from plugins.store_connection import use_store_connection
from tasks.errors import NEVER_RETRY, SettingsError

# Airflow kills a task five seconds after it asked it to stop; a step that ignores SIGTERM must be gone by then.
GRACE = 3.0


def step_operator(step: str, *, gpu: bool = False, **kwargs: Any) -> BaseOperator:
    """The operator that runs a step where `RETRAIN_RUNNER` says; `gpu` matters to pods only.

    Raises `SettingsError` when `RETRAIN_RUNNER` is missing or unknown.
    """
    runner = os.environ.get("RETRAIN_RUNNER", "")
    arguments = {"task_id": step, "step": step, **kwargs}
    if runner == "local":
        operator: BaseOperator = LocalStep(**arguments)
        operator.operator_extra_links = LINKS.get(step, [])
        return operator
    if runner == "kubernetes":
        from plugins.retrain_pod import PodStep  # noqa: PLC0415  (the Kubernetes client takes a second to import)

        operator = PodStep(gpu=gpu, **arguments)
        pod = [PodLink()] if os.environ.get("RETRAIN_POD_URL") else []
        operator.operator_extra_links = [*LINKS.get(step, []), *pod]
        return operator
    raise SettingsError(
        f"RETRAIN_RUNNER is {runner!r}: set it, wherever Airflow runs, to 'local' (a step is a process of the worker) "
        f"or 'kubernetes' (a step is a pod)"
    )


def step_arguments(step: str, run_uri: str, pipeline_file: str | None, context: Context) -> list[str]:
    """What follows `python -m tasks`. With a pipeline's file come the settings that were changed for this run."""
    arguments = [step, "--run", run_uri]
    if pipeline_file:
        arguments += ["--pipeline", pipeline_file]
        for name, value in changed_settings(context["params"], context["dag"].params).items():
            arguments += ["--set", f"{name}={json.dumps(value)}"]
    return arguments


def changed_settings(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The params that differ from the file's values, and those that no setting has: `configure` will refuse these."""
    return {name: value for name, value in params.items() if name not in defaults or value != defaults[name]}


def report_result(operator: Any, context: Context) -> dict[str, Any]:
    """What the step left in the store, for the XCom. Its figures become metrics, and an asset's event has it too."""
    from tasks.run import Run  # noqa: PLC0415  (brings boto3, which the scheduler has no use for)

    run = Run.at(operator.run_uri)
    result = run.result(operator.step)
    metrics.emit(operator.step, result, dag_id=context["ti"].dag_id)
    for asset in operator.outlets:
        context["outlet_events"][asset].extra = {
            "run": operator.run_uri,
            "pointer": asset.uri,
            "metrics": (run.find_result("evaluate") or {}).get("bleu"),
            **result,
        }
    return result


class LocalStep(BaseOperator):
    """Runs a step as a process of this worker, and its output into the task's log.

    An exit code that says "never retry" (bad data, bad settings) fails the task for good; any other may be retried.
    Stopping the task stops the step and every process that it started.

    :param step: the step's name, as in `python -m tasks STEP`
    :param run_uri: where the run is in the store (templated)
    :param pipeline_file: for `configure` only: the pipeline's file
    """

    template_fields: tuple[str, ...] = ("run_uri",)
    ui_color = "#dbeafe"
    ui_fgcolor = "#1e3a8a"

    def __init__(self, *, step: str, run_uri: str, pipeline_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step = step
        self.run_uri = run_uri
        self.pipeline_file = pipeline_file
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Context) -> dict[str, Any] | None:
        """Run the step; returns its result. Raises with the step's own one-line reason."""
        self.run_program(step_arguments(self.step, self.run_uri, self.pipeline_file, context))
        return report_result(self, context)

    def run_program(self, arguments: list[str]) -> None:
        """Run `python -m tasks` with arguments to its end. Raises with the program's own one-line reason."""
        use_store_connection()
        self.log.info("python -m tasks %s", subprocess.list2cmdline(arguments))
        with tempfile.NamedTemporaryFile() as termination_log:
            code, last_line = self._run([sys.executable, "-m", "tasks", *arguments], termination_log.name)
            reason = Path(termination_log.name).read_text(encoding="utf-8").strip() or last_line
        if code in NEVER_RETRY:
            raise AirflowFailException(f"{self.step}: {reason}")
        if code < 0:
            hint = ": the machine may have run out of memory" if code == -signal.SIGKILL else ""
            raise AirflowException(f"{self.step} was stopped by {signal.Signals(-code).name}{hint}")
        if code:
            raise AirflowException(f"{self.step} failed with exit code {code}: {reason}")

    def _run(self, command: list[str], termination_log: str) -> tuple[int, str]:
        """Run a command, copy its output to the log as it comes, and return the exit code and the last line."""
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=step_environment() | {"RETRAIN_TERMINATION_LOG": termination_log},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
        threading.Thread(target=_end_with, args=[self._process], daemon=True).start()
        line = "it said nothing"
        assert self._process.stdout  # noqa: S101  (for the type checker)
        for raw in self._process.stdout:
            line = raw.rstrip() or line
            self.log.info("%s", raw.rstrip())
        return self._process.wait(), line

    def on_kill(self) -> None:
        """Ask the step and its children to stop, and make them when they do not."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
                return
            os.killpg(process.pid, signal.SIGKILL)


class Command(LocalStep):
    """Runs `python -m tasks` with any arguments, without a run; always a process of this worker.

    :param arguments: what follows `python -m tasks` (templated); empty ones are left out
    """

    template_fields: tuple[str, ...] = ("arguments",)

    def __init__(self, *, arguments: list[str], **kwargs: Any) -> None:
        super().__init__(step=arguments[0], run_uri="", **kwargs)
        self.arguments = arguments

    def execute(self, context: Context) -> None:
        """Run it to its end. Raises with the program's own one-line reason."""
        self.run_program([argument for argument in self.arguments if argument])


class RollBack(LocalStep):
    """Points production at another version, for the person who triggered the DAG; always a process of this worker.

    Not if somebody else has moved production since: a run that waited, or is cleared long after, would undo that.

    :param model: the model's name
    :param version: the version that production shall be (templated)
    :param why: the reason, for the history (templated)
    """

    template_fields: tuple[str, ...] = ("version", "why")

    def __init__(self, *, model: str, version: str, why: str, **kwargs: Any) -> None:
        super().__init__(step="rollback", run_uri="", **kwargs)
        self.model = model
        self.version = version
        self.why = why
        self.operator_extra_links = []

    def execute(self, context: Context) -> dict[str, Any]:
        """Roll back; returns the event that the history has of it."""
        from tasks import registry  # noqa: PLC0415  (brings boto3)
        from tasks.storage import Store  # noqa: PLC0415

        store = Store(bucket())
        asked = context["dag_run"].run_after
        moves = [event for event in registry.history(store, self.model) if event.alias == registry.PRODUCTION]
        if moves and datetime.fromisoformat(moves[-1].time) > asked and moves[-1].version != self.version:
            raise AirflowFailException(
                f"rollback: production of {self.model} has moved to {moves[-1].version} since this was asked for: "
                f"look again, and trigger a new run if it is still wanted"
            )
        who = getattr(context["dag_run"], "triggering_user_name", None) or getpass.getuser()
        arguments = ["models", "rollback", self.model, "--bucket", bucket(), f"--version={self.version}"]
        self.run_program([*arguments, f"--why={self.why}", f"--who={who}"])
        pointer = registry.read_pointer(store, self.model)
        event = asdict(registry.read_event(store, self.model, pointer.event)) if pointer else {}
        for asset in self.outlets:
            found = registry.manifest(store, self.model, registry.PRODUCTION)
            context["outlet_events"][asset].extra = {
                "pointer": asset.uri,
                "metrics": found.metadata.get("metrics"),
                "version": event.get("version"),
                "event": event.get("number"),
            }
        return event


def step_environment() -> dict[str, str]:
    """The worker's environment without Airflow's own settings, in which there are secrets that no step needs."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "_AIRFLOW_"))}
    return own | {"PYTHONUNBUFFERED": "1"}


def _end_with(process: subprocess.Popen[str]) -> None:
    """Wait for a step's end, then end what it left behind: an orphan would hold the output, and so the task, open."""
    # Not reaped yet, so that its id, which is its group's, cannot be another's by now.
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        os.killpg(process.pid, signal.SIGKILL)
