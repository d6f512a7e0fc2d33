"""The demo: one run of the demo pipeline through Airflow's scheduler, watched, judged, and its model put to use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from plugins.pipelines import run_id
from scripts.airflow_api import AirflowApi
from scripts.stack import ROOT, Stack, environment
from tasks import registry
from tasks.run import Run

MODEL = "demo"
DAG_ID = "retrain_demo"
HARMFUL = {"training.learning_rate": 1.0}  # steps so long that the weights are thrown about
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # all that the demo needs is in the repository
PARSED_WITHIN = 60.0  # seconds in which Airflow must have read the DAG files
FINISHED = ("success", "failed")
STATES = {  # an Airflow state as people read it, and its colour
    None: ("", "dim"),
    "success": ("done", "green"),
    "failed": ("failed", "bold red"),
    "upstream_failed": ("not run", "dim"),
    "running": ("running", "bold yellow"),
    "up_for_retry": ("waits to be tried again", "yellow"),
    "queued": ("starts", "yellow"),
    "scheduled": ("starts", "yellow"),
}


class DemoError(Exception):
    """The demo did not go as it should. The message says what happened and where to look."""


def run_demo(stack: Stack, console: Console, *, reject: bool) -> None:
    """Start what is missing, run the demo, and stop what was started.

    Raises `DemoError` where the outcome is not the one that was to be shown, and what `Stack.up` raises.
    """
    since = datetime.now(UTC)
    started = stack.up(console.print, OFFLINE)
    try:
        with environment(stack.environment):
            Demo(stack, console, since if started else None).run(HARMFUL if reject else {}, reject=reject)
    finally:
        if started:
            console.print("\nStopping what was started; the data stays in .retrain/ ...")
            stack.down(started)
    if started:
        console.print(
            "[bold]make up[/] starts Airflow and the store again to look around, [bold]make down[/] stops them."
        )
    else:
        where_to_look(stack, console)


def where_to_look(stack: Stack, console: Console) -> None:
    """Say where everything is that `make up` started."""
    console.print(f"Airflow: [bold]{stack.url}[/], user admin, password in {stack.password_file}", soft_wrap=True)
    if stack.store is None:
        console.print(f"Object store: S3_ENDPOINT_URL, bucket {stack.bucket}")
        return
    page = f"; its web page: http://127.0.0.1:{stack.ports['console']}" if stack.store.kind == "minio" else ""
    console.print(
        f"Object store ({stack.store.kind}): [bold]{stack.store.endpoint}[/], bucket {stack.bucket}, "
        f"key in {stack.secrets_file}{page}",
        soft_wrap=True,
    )


class Demo:
    """A run of the demo pipeline; `since` is when Airflow was started for it, or None if it was there already."""

    def __init__(self, stack: Stack, console: Console, since: datetime | None) -> None:
        self.stack, self.console, self.since = stack, console, since
        self.api = stack.api()

    def run(self, settings: dict[str, Any], *, reject: bool) -> None:
        """Trigger, watch, judge, use. Raises `DemoError` where the outcome is not the one that was to be shown."""
        was_paused = self._wait_for_dag()
        if self.since:  # nobody else can have started these: an earlier demo was interrupted
            for leftover in self.api.unfinished_runs(DAG_ID):
                self.api.fail_run(DAG_ID, leftover)
        self.api.pause(DAG_ID, False)
        try:
            dag_run = self.api.trigger(DAG_ID, settings)
            run = Run.at(f"s3://{self.stack.bucket}/runs/{run_id(MODEL, dag_run)}")
            production = registry.read_pointer(run.store, MODEL)
            changes = "".join(f" with {name} = {value}" for name, value in settings.items())
            self.console.print(f"\nAirflow runs [bold]{DAG_ID}[/]{changes}\n")
            state = Watch(self.api, self.console, dag_run, run).until_finished()
        finally:
            self.api.pause(DAG_ID, was_paused)  # the weekly schedule is for whoever wants it
        report = self._keep_report(run)
        if state != "success":
            raise DemoError(f"{self._why_failed(dag_run)}\n\nThe report so far: {report or 'none'}")
        self._conclude(run, production.version if production else None, reject=reject)
        self.console.print(f"\nThe report of this run: [bold]{report}[/]", soft_wrap=True)

    def _wait_for_dag(self) -> bool:
        """Wait until Airflow has read the DAG as it is now; returns whether it is switched off."""
        deadline = time.monotonic() + PARSED_WITHIN
        while time.monotonic() < deadline:
            dag = self.api.find_dag(DAG_ID)
            if dag and (not self.since or datetime.fromisoformat(dag["last_parsed_time"]) > self.since):
                return dag["is_paused"]
            time.sleep(0.3)
        errors = "\n".join(self.api.import_errors())
        raise DemoError(f"Airflow has not read the DAG {DAG_ID} in {PARSED_WITHIN:.0f} s. {errors}")

    def _keep_report(self, run: Run) -> Path | None:
        """Copy the run's report to where a browser can open it without the store."""
        if not run.store.exists(run.key("report.html")):
            return None
        path = self.stack.folder / "reports" / f"{run.id}.html"
        run.store.download(run.key("report.html"), path)
        return path

    def _why_failed(self, dag_run: str) -> str:
        """The failed tasks, with the end of their logs, where the reason is."""
        texts = [f"The run {dag_run} failed."]
        for name, task in self.api.task_instances(DAG_ID, dag_run).items():
            if task["state"] == "failed":
                log = self.api.log(DAG_ID, dag_run, name, task["try_number"])
                lines = [line for line in log if not line.startswith("::")]  # Airflow's marks for folding
                texts.append(f"\nThe end of the log of {name}:\n" + "\n".join(lines[-15:]))
        return "\n".join(texts)

    def _conclude(self, run: Run, before: str | None, *, reject: bool) -> None:
        """Say how it ended and show that it is so. Raises `DemoError` when it is not the end that was to be shown."""
        gate = run.find_result("gate")
        if gate:
            self.console.print("", checks_table(gate["checks"]), sep="\n")
            for sentence in [check["sentence"] for check in gate["checks"] if not check["passed"]]:
                self.console.print(f"[bold red]✗[/] {sentence}")
        pointer = registry.read_pointer(run.store, MODEL)
        after = pointer.version if pointer else None
        if gate and gate["decision"] == "reject":
            self.console.print(f"\n[bold]Rejected.[/] Production before: {before or 'none'}; now: {after or 'none'}.")
            if not reject:
                raise DemoError("The gate refused the candidate, and this run should have been promoted.")
            if before != after:
                raise DemoError("Production moved although the gate refused the candidate.")
            return
        if reject:
            raise DemoError("The gate should have refused the candidate, and did not.")
        if gate:
            self.console.print(f"\n[bold]Promoted.[/] Production before: {before or 'none'}; now: {after}.")
        else:
            self.console.print(
                f"\n[bold]Unchanged.[/] Data, base model and settings are those that production ({after}) was trained "
                f"with, so there was nothing to do."
            )
        self._use_production(run)

    def _use_production(self, run: Run) -> None:
        """Do what a downstream service does: pull production, verified, and translate with it."""
        directory = self.stack.folder / "pulled-model"
        shutil.rmtree(directory, ignore_errors=True)
        version = registry.pull(run.store, MODEL, registry.PRODUCTION, directory)
        self.console.print(
            f"\nA service pulls the production model: {version}, every file verified. It translates ...\n"
        )
        settings = run.settings
        answer = subprocess.run(
            [
                sys.executable,
                "-m",
                "scripts.before_after",
                settings.base_model.source,
                directory,
                settings.preprocessing.prompt,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode:
            raise DemoError(f"The pulled model cannot be used:\n{answer.stderr[-3000:]}")
        table = Table("English", "before: the base model", "after: production", box=None, padding=(0, 2))
        for row in json.loads(answer.stdout.splitlines()[-1]):
            table.add_row(row["source"], Text(row["before"], "dim"), Text(row["after"], "bold"))
        self.console.print(table)


class Watch:
    """Shows the tasks of a run as they go: a table that is redrawn, or lines where the output is no terminal."""

    def __init__(self, api: AirflowApi, console: Console, dag_run: str, run: Run) -> None:
        self.api, self.console, self.dag_run, self.run = api, console, dag_run, run
        self.order = api.task_order(DAG_ID)
        self._said: dict[str, str | None] = {}

    def until_finished(self) -> str:
        """Watch until the run has ended; returns its state."""
        with Live(console=self.console, auto_refresh=False) as live:
            while True:
                state = self.api.run_state(DAG_ID, self.dag_run)
                tasks = self.api.task_instances(DAG_ID, self.dag_run)
                if self.console.is_terminal:
                    live.update(self._table(tasks), refresh=True)
                else:
                    self._say_what_is_new(tasks)
                if state in FINISHED:
                    return state
                time.sleep(0.5)

    def _table(self, tasks: dict[str, dict[str, Any]]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        table.add_column("task", no_wrap=True, min_width=max(len(task["task_display_name"]) for task in tasks.values()))
        table.add_column("", no_wrap=True, min_width=10)
        table.add_column("time", no_wrap=True, min_width=5, justify="right")
        table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
        for name in self.order:
            task = tasks.get(name, {"task_display_name": name, "state": None})
            if task["state"] == "skipped":  # the way not taken
                continue
            word, style = STATES.get(task["state"], (task["state"], ""))
            table.add_row(
                task["task_display_name"], Text(word, style), _clock(task), Text(self._note(name, task), "dim")
            )
        return table

    def _say_what_is_new(self, tasks: dict[str, dict[str, Any]]) -> None:
        for name in self.order:
            task = tasks.get(name)
            if (
                task
                and task["state"] != self._said.get(name)
                and task["state"] in (*FINISHED, "running", "up_for_retry")
            ):
                self._said[name] = task["state"]
                word = STATES[task["state"]][0]
                note = self._note(name, task) if task["state"] == "success" else ""
                print(f"{task['task_display_name']}: {word} {_clock(task)} {note}".rstrip(), flush=True)

    def _note(self, name: str, task: dict[str, Any]) -> str:
        """What a finished step found; what a running one says."""
        if task["state"] == "success":
            return (self.run.find_result(name) or {}).get("summary", "")
        if task["state"] in ("running", "up_for_retry"):
            lines = self.api.log(DAG_ID, self.dag_run, name, task["try_number"])
            spoken = [line for line in lines if re.match(r"\d\d:\d\d:\d\d ", line)]
            return spoken[-1][9:] if spoken else ""
        return ""


def checks_table(checks: list[dict[str, Any]]) -> Table:
    """The gate's checks, for people; a sentence for those that failed."""
    table = Table(title="The gate", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("check")
    table.add_column("observed", justify="right")
    table.add_column("required")
    for check in checks:
        mark = Text("✓", "green") if check["passed"] else Text("✗", "bold red")
        observed = "none" if check["observed"] is None else f"{check['observed']:.4g}"
        table.add_row(mark, check["name"], observed, check["required"])
    return table


def _clock(task: dict[str, Any]) -> str:
    """How long a task took, or has been going on."""
    if not task.get("start_date") or task["state"] in ("skipped", "upstream_failed"):
        return ""
    end = datetime.fromisoformat(task["end_date"]) if task.get("end_date") else datetime.now(UTC)
    return f"{(end - datetime.fromisoformat(task['start_date'])).total_seconds():.0f} s"
