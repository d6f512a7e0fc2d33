"""Airflow DAGs that retrain translation models: one DAG for each file in `config/`.

    configure -> pull -> changed? -+-> validate -> preprocess -> train -> evaluate -> gate -> decision -+-> promote
                                   +-> unchanged                                                        +-> reject

and then `report`, whatever happened. The work itself is in `tasks/`, a module a step.
"""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset, CronTriggerTimetable, Param, task

from plugins.pipelines import ROOT, read_pipelines, run_id
from plugins.retrain_operator import step_operator
from tasks.settings import Settings, form_fields

BUCKET = os.environ.get("RETRAIN_BUCKET", "retrain")


@dataclass(frozen=True)
class Step:
    """What Airflow needs to know of a step: the name people see, when to give up, and whether it needs a GPU."""

    title: str
    timeout: timedelta
    gpu: bool = False


STEPS = {
    "configure": Step("Check settings", timedelta(minutes=15)),
    "pull": Step("Pull data and base model", timedelta(hours=2)),
    "validate": Step("Validate data", timedelta(hours=2)),
    "preprocess": Step("Preprocess", timedelta(hours=4)),
    "train": Step("Train", timedelta(hours=24), gpu=True),
    "evaluate": Step("Evaluate", timedelta(hours=8), gpu=True),
    "gate": Step("Judge by the gate", timedelta(hours=1)),
    "promote": Step("Promote to production", timedelta(hours=1)),
    "reject": Step("Reject", timedelta(minutes=15)),
    "report": Step("Write the report", timedelta(minutes=30)),
}

RETRIES = {
    "retries": 3,
    "retry_delay": timedelta(minutes=1),
    "retry_exponential_backoff": 2.0,  # after 1, 2 and 4 minutes
    "max_retry_delay": timedelta(minutes=15),
}

DAG_DOC = """
**{description}**

Trains a candidate, compares it with the model in production on the same test split, and publishes it to
`s3://{bucket}/models/{name}/` only if every check of the gate holds. A run that finds nothing changed since production
stops there, green.

- *Trigger* changes any setting for one run. `force` trains although nothing has changed.
- Every run leaves a page: `report.html` in the run's folder in the store. Its address is in the log of *{report}*.
- A task is safe to clear and run again: it overwrites only what it wrote before.
- The settings: `config/{file}`.
"""


def retrain_dag(file: Path, settings: Settings) -> DAG:
    """The DAG of one pipeline."""
    with DAG(
        dag_id=f"retrain_{settings.name.replace('-', '_')}",
        dag_display_name=f"Retrain {settings.name}",
        description=settings.description,
        doc_md=DAG_DOC.format(
            **settings.model_dump(include={"name", "description"}),
            bucket=BUCKET,
            file=file.name,
            report=STEPS["report"].title,
        ),
        schedule=timetable(settings.schedule),
        catchup=False,
        max_active_runs=1,
        default_args=RETRIES,
        params=form(settings),
        tags=["retrain", settings.data.pair],
        user_defined_macros={"retrain_run_id": partial(run_id, settings.name)},
    ) as dag:
        model = Asset(
            name=f"{settings.name} in production",
            uri=f"s3://{BUCKET}/models/{settings.name}/production.json",
            group="model",
        )
        step = partial(make_step, pipeline_file=path_for_steps(file))
        configure, pull, validate, preprocess = step("configure"), step("pull"), step("validate"), step("preprocess")
        train, evaluate, gate = step("train"), step("evaluate"), step("gate")
        promote, reject, report = step("promote", outlets=[model]), step("reject"), step("report")
        unchanged = EmptyOperator(task_id="unchanged", task_display_name="Nothing has changed")

        @task.branch(task_id="changed", task_display_name="Changed since production?")
        def changed(found: dict[str, Any]) -> str:
            return "validate" if found["changed"] else "unchanged"

        @task.branch(task_id="decision", task_display_name="Promote or reject?")
        def decision(verdict: dict[str, Any]) -> str:
            return verdict["decision"]

        configure >> pull >> changed(pull.output) >> [validate, unchanged]
        validate >> preprocess >> train >> evaluate >> gate >> decision(gate.output) >> [promote, reject]
        # A teardown runs whatever became of the tasks before it, and leaves the run's outcome to them.
        [promote, reject, unchanged] >> report.as_teardown()
    return dag


def make_step(name: str, *, pipeline_file: str, **kwargs: Any) -> Any:
    """The task of a step; only `configure` is told the pipeline's file, the others read what it wrote."""
    step = STEPS[name]
    return step_operator(
        name,
        run_uri=f"s3://{BUCKET}/runs/{{{{ retrain_run_id(run_id) }}}}",
        pipeline_file=pipeline_file if name == "configure" else None,
        gpu=step.gpu,
        task_display_name=step.title,
        execution_timeout=step.timeout,
        doc_md=step_doc(name),
        **kwargs,
    )


def step_doc(name: str) -> str:
    """What the step's own module says of it, read without importing the libraries that the step needs."""
    module = ROOT / "tasks" / f"{name}.py"
    return f"```text\n{ast.get_docstring(ast.parse(module.read_text(encoding='utf-8')))}\n```"


def path_for_steps(file: Path) -> str:
    """The file as a step finds it: from the code's root, which is another folder in a pod, if the file is below it."""
    return str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)


def timetable(schedule: str | None) -> CronTriggerTimetable | None:
    """When runs start by themselves: only in time to come."""
    # By default, switching a weekly DAG on starts a run at once if the last due time is less than 17 hours ago.
    return CronTriggerTimetable(schedule, timezone="UTC", run_immediately=timedelta(0)) if schedule else None


def form(settings: Settings) -> dict[str, Param]:
    """The trigger form: every setting that a run may change, with the file's value."""
    return {name: Param(**field) for name, field in form_fields(settings).items()}


for pipeline_file, pipeline in read_pipelines()[0].items():
    retrain_dag(pipeline_file, pipeline)
