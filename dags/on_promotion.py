"""An example of what follows a promotion: pull the new production model as a service would, and see that it translates.

It is scheduled on the models' assets, so it runs when a promotion or a rollback has moved production, and never after a
run that was rejected, failed or found nothing changed. Make yours from it: deploy a service, warm a cache, tell a team.
Translating takes the libraries of training where Airflow's workers run; on a cluster, make the task a pod.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, AssetAny, task

from plugins.pipelines import ROOT, model_asset, read_pipelines
from plugins.store_connection import use_store_connection

MODELS = {model_asset(settings.name).uri: settings.name for settings in read_pipelines()[0].values()}

with DAG(
    dag_id="on_promotion",
    dag_display_name="After a promotion",
    description="Pull what has become production, and try it",
    doc_md=__doc__,
    schedule=AssetAny(*map(model_asset, MODELS.values())) if MODELS else None,
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["example"],
):

    @task(task_display_name="Try the production model", execution_timeout=timedelta(hours=1))
    def smoke_test(triggering_asset_events: dict[Any, list[Any]] | None = None) -> dict[str, str]:
        """Try the newest version of each model that moved."""
        use_store_connection()
        tried = {}
        for asset, events in (triggering_asset_events or {}).items():
            model, version = MODELS[asset.uri], events[-1].extra["version"]
            subprocess.run([sys.executable, "-m", "scripts.smoke_test", model, version], cwd=ROOT, check=True)
            tried[model] = version
        return tried

    smoke_test()
