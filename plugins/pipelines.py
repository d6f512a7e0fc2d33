"""The pipelines of this deployment, which are the files in `config/`, and the names of their runs."""

from __future__ import annotations

import hashlib
import os
import re
from datetime import timedelta
from pathlib import Path

from airflow.sdk import Asset

from tasks.errors import SettingsError
from tasks.settings import Settings, load

ROOT = Path(__file__).parent.parent

RETRIES = {
    "retries": 3,
    "retry_delay": timedelta(minutes=1),
    "retry_exponential_backoff": 2.0,  # after 1, 2 and 4 minutes
    "max_retry_delay": timedelta(minutes=15),
}


def bucket() -> str:
    """The bucket of the object store that everything is kept in."""
    return os.environ.get("RETRAIN_BUCKET", "retrain")


def dag_id(pipeline: str) -> str:
    """The id of a pipeline's DAG."""
    return f"retrain_{pipeline.replace('-', '_')}"


def model_asset(pipeline: str) -> Asset:
    """What other DAGs are scheduled on: the pointer to the model in production, whenever it moves."""
    uri = f"s3://{bucket()}/models/{pipeline}/production.json"
    return Asset(name=f"{pipeline} in production", uri=uri, group="model")


def read_pipelines() -> tuple[dict[Path, Settings], list[str]]:
    """The settings of every usable file, and one sentence for each file that is not.

    `RETRAIN_CONFIG` names another folder than `config/`.
    """
    folder = Path(os.environ.get("RETRAIN_CONFIG") or ROOT / "config")
    pipelines: dict[Path, Settings] = {}
    faults = []
    names: dict[str, Path] = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            settings = load(file)
        except SettingsError as error:
            faults.append(str(error))
            continue
        if other := names.get(settings.name):
            faults.append(f"{file}: name: {settings.name!r} is taken by {other}; two pipelines would share one model")
            continue
        names[settings.name] = file
        pipelines[file] = settings
    if not pipelines and not faults:
        faults.append(
            f"{folder} has no pipeline: expected at least one .yaml file there (RETRAIN_CONFIG names the folder)"
        )
    return pipelines, faults


def run_id(pipeline: str, dag_run_id: str) -> str:
    """A run's name in the store: readable, safe in a key, and its own for each pipeline and Airflow run id.

    Always the same for the same run, so that a retried or cleared task finds what was there.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", dag_run_id)[:100].strip("-")
    # Two run ids may look alike once ':' and '+' are gone, and two pipelines may have the same one.
    digest = hashlib.sha256(f"{pipeline}\n{dag_run_id}".encode()).hexdigest()[:8]
    return f"{pipeline}-{readable}-{digest}"
