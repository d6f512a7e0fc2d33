"""Keeps the store small: deletes old versions, what no version names, and the heavy files of old runs.

Switched on, it deletes every Sunday what is past the defaults of its form. Triggered by hand it only lists, in the
tasks' logs, what it would delete, unless *Delete* is ticked. What stays, whatever the form says: all that an alias
stands for, and files younger than a day. A version that was deleted cannot come back.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable, Param

from plugins.pipelines import RETRIES, bucket, read_pipelines
from plugins.retrain_operator import Command

HOW = ["--bucket", bucket(), "{{ '' if params.delete or dag_run.run_type == 'scheduled' else '--dry-run' }}"]

with DAG(
    dag_id="prune",
    dag_display_name="Prune the store",
    description="Delete old versions, and the heavy files of old runs",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 12 * * 0", timezone="UTC", run_immediately=timedelta(0)),
    catchup=False,
    max_active_runs=1,
    default_args={**RETRIES, "execution_timeout": timedelta(hours=2)},
    params={
        "delete": Param(False, type="boolean", title="Delete", description="Otherwise only list what would be deleted"),
        "keep": Param(10, type="integer", minimum=1, title="Versions", description="Of each model, the newest stay"),
        "days": Param(30, type="integer", minimum=1, title="Days", description="Runs older than this lose heavy files"),
    },
    tags=["maintenance"],
):
    for settings in read_pipelines()[0].values():
        Command(
            task_id=f"versions_{settings.name.replace('-', '_')}",
            task_display_name=f"Versions of {settings.name}",
            arguments=["models", "prune", settings.name, "--keep", "{{ params.keep }}", *HOW],
        )
    Command(task_id="runs", task_display_name="Runs", arguments=["prune-runs", "--days", "{{ params.days }}", *HOW])
