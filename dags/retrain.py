"""Airflow DAGs that retrain translation models: for each file in `config/` one that retrains, and one that rolls back.

    configure -> pull -> changed? -+-> validate -> preprocess -> train -> evaluate -> gate -> decision -+-> promote
                                   +-> unchanged                                                        +-> reject

and then `report`, whatever happened. The work itself is in `tasks/`, a module a step. With `approval: human` a person
decides between promote and reject what the gate would promote:

    gate -> preview -> decision -+-> approval -+-> promote
                                 +-> reject <--+
"""

from __future__ import annotations

import ast
import logging
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, CronTriggerTimetable, Param, TaskGroup, task

from plugins import alerts
from plugins.alerts import Alert
from plugins.approval import Approval, checks_table
from plugins.gpu_pool import GPU_POOL
from plugins.links import page_url
from plugins.pipelines import RETRIES, ROOT, bucket, dag_id, model_asset, read_pipelines, run_id
from plugins.retrain_operator import RollBack, step_operator
from tasks.settings import Settings, form_fields

log = logging.getLogger(__name__)

RUN_URI = f"s3://{bucket()}/runs/{{{{ retrain_run_id(run_id) }}}}"
ONE_WAY = "none_failed_min_one_success"  # of the ways that lead to a task, those not taken are skipped


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

DAG_DOC = """
**{description}**

Trains a candidate, compares it with the model in production on the same test split, and publishes it to
`s3://{bucket}/models/{name}/` only if every check of the gate holds. A run that finds nothing changed since production
stops there, green.

- *Trigger* changes any setting for one run; the preset *quick* only sees whether everything works. `force` trains
  although nothing has changed.
- The grid says what a run came to: green is one of *Promote to production*, *Reject* and *Nothing has changed*.
- Every run leaves a page: *Report* under the Details of *{report}*. [Models]({page}) shows all versions and rolls back.
- A task is safe to clear and run again: it overwrites only what it wrote before.
- The settings: `config/{file}`.
"""

ROLL_BACK_DOC = """
Points production of **{name}** at a version that was published before. Services get it with their next pull.

The versions are on the page [Models]({page}), which starts this DAG too. The history keeps who did it and why. The next
run of *Retrain {name}* trains and judges against that version.
"""


def retrain_dag(file: Path, settings: Settings) -> DAG:
    """The DAG that retrains the model of one pipeline."""
    with DAG(
        dag_id=dag_id(settings.name),
        dag_display_name=f"Retrain {settings.name}",
        description=settings.description,
        doc_md=DAG_DOC.format(
            **settings.model_dump(include={"name", "description"}),
            bucket=bucket(),
            file=file.name,
            report=STEPS["report"].title,
            page=page_url(dag_id(settings.name)),
        ),
        schedule=timetable(settings.schedule),
        catchup=False,
        max_active_runs=1,
        default_args={
            **RETRIES,
            "priority_weight": settings.operation.priority,
            "weight_rule": "absolute",
            "on_failure_callback": Alert(settings, alerts.failed),
        },
        deadline=alerts.deadline(settings),
        params=form(settings),
        tags=["retrain", settings.data.pair],
        user_defined_macros={"retrain_run_id": partial(run_id, settings.name), "checks_table": checks_table},
    ) as dag:
        step = partial(make_step, pipeline_file=path_for_steps(file))
        configure, pull = step("configure"), step("pull")
        with TaskGroup(
            "data",
            group_display_name="Data",
            prefix_group_id=False,
            tooltip="Prove that the data is fit, and make it numbers",
        ):
            validate = step("validate", on_success_callback=Alert(settings, alerts.drifted))
            preprocess = step("preprocess")
        with TaskGroup(
            "model",
            group_display_name="Model",
            prefix_group_id=False,
            tooltip="Make a candidate, and compare it with production",
        ):
            train, evaluate = step("train"), step("evaluate")
        gate = step("gate")
        promote = step("promote", outlets=[model_asset(settings.name)], trigger_rule=ONE_WAY)
        reject = step("reject", on_success_callback=Alert(settings, alerts.refused), trigger_rule=ONE_WAY)
        report = step("report")
        unchanged = EmptyOperator(
            task_id="unchanged",
            task_display_name="Nothing has changed",
            on_success_callback=Alert(settings, alerts.unchanged),
            doc_md="Data, base model and settings are those that production was trained with: there is nothing to do.",
        )
        let_through = "approval" if settings.approval == "human" else "promote"

        @task.branch(task_id="changed", task_display_name="Changed since production?")
        def changed(found: dict[str, Any]) -> str:
            """Goes on where data, base model or settings are not those of production, or `force` is on."""
            log.info("changed: is there anything new to train on? pull found %s", found["summary"])
            return "validate" if found["changed"] else "unchanged"

        @task.branch(task_id="decision", task_display_name="Promote or reject?")
        def decision(verdict: dict[str, Any]) -> str:
            """Goes the way that the gate has decided, and no other: it judges nothing by itself."""
            log.info("decision: where does the gate's verdict lead? It is %s", verdict["summary"])
            return let_through if verdict["decision"] == "promote" else "reject"

        configure >> pull >> changed(pull.output) >> [validate, unchanged]
        validate >> preprocess >> train >> evaluate >> gate
        decided = decision(gate.output)
        if settings.approval == "human":
            approval = ask_a_person(settings)
            gate >> step("report", task_id="preview", task_display_name="Write the report to decide by") >> decided
            decided >> [approval, reject]
            approval >> [promote, reject]
        else:
            decided >> [promote, reject]
        # A teardown runs whatever became of the tasks before it, and leaves the run's outcome to them.
        [promote, reject, unchanged] >> report.as_teardown()
    return dag


def ask_a_person(settings: Settings) -> Approval:
    """The task that waits for a person's word."""
    report = page_url(f"{dag_id(settings.name)}/runs/{{{{ retrain_run_id(run_id) }}}}/report")
    return Approval(
        task_id="approval",
        task_display_name="Approve?",
        run_uri=RUN_URI,
        hours=settings.operation.approval_hours,
        subject=f"Shall this candidate be {settings.name} in production?",
        body=f"{{{{ checks_table(ti.xcom_pull('gate')) }}}}\n\n**[The report]({report})**\n\n"
        f"Without an answer within {settings.operation.approval_hours:g} hours it is **not** promoted.",
        doc_md="A person decides under *Required actions*. No answer in time is a no.",
    )


def roll_back_dag(settings: Settings) -> DAG:
    """The DAG that points production of one pipeline at another version."""
    with DAG(
        dag_id=f"rollback_{settings.name.replace('-', '_')}",
        dag_display_name=f"Roll back {settings.name}",
        description=f"Point production of {settings.name} at another version",
        doc_md=ROLL_BACK_DOC.format(name=settings.name, page=page_url(dag_id(settings.name))),
        schedule=None,
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=False,  # it runs only when somebody says so, and then at once
        default_args={**RETRIES, "on_failure_callback": Alert(settings, alerts.failed)},
        params={
            "version": Param(
                type="string",
                title="Version",
                pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
                description_md=f"What production shall be. [Models]({page_url(dag_id(settings.name))}) lists them.",
            ),
            "reason": Param(
                type="string",
                title="Reason",
                minLength=3,
                maxLength=500,
                description="For the history, and for whoever asks in half a year",
            ),
        },
        tags=["rollback", settings.data.pair],
    ) as dag:
        RollBack(
            task_id="rollback",
            task_display_name="Move production",
            model=settings.name,
            version="{{ params.version }}",
            why="{{ params.reason }}",
            outlets=[model_asset(settings.name)],
            execution_timeout=timedelta(minutes=15),
            doc_md="The same conditional move as a promotion, and another line in the history.",
        )
    return dag


def make_step(name: str, *, pipeline_file: str, **kwargs: Any) -> Any:
    """The task of a step; only `configure` is told the pipeline's file, the others read what it wrote."""
    step = STEPS[name]
    options = {"task_display_name": step.title, **({"pool": GPU_POOL} if step.gpu else {}), **kwargs}
    return step_operator(
        name,
        run_uri=RUN_URI,
        pipeline_file=pipeline_file if name == "configure" else None,
        gpu=step.gpu,
        execution_timeout=step.timeout,
        doc_md=step_doc(name),
        **options,
    )


@cache
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
    """The trigger form: the settings that a person changes for one run, with the file's values."""
    return {name: Param(**field) for name, field in form_fields(settings).items() if not field.get("expert")}


for pipeline_file, pipeline in read_pipelines()[0].items():
    retrain_dag(pipeline_file, pipeline)
    roll_back_dag(pipeline)
