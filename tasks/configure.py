"""configure: check the settings and write them down for every later step.

    python -m tasks configure --run s3://retrain/runs/RUN_ID --pipeline config/demo.yaml --set training.epochs=1

Reads    the pipeline's file
Writes   runs/RUN_ID/config.json    the settings in effect, what was asked for, the code's version, when
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tasks
from tasks import settings
from tasks.run import Run
from tasks.storage import MissingObjectError

LIBRARIES = ("tensorflow", "transformers", "datasets", "sacrebleu", "great-expectations")


def run(run: Run, pipeline: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Write `config.json`; run again, it keeps the time of the first, from which a version's name is made.

    Raises `SettingsError` that names the field.
    """
    checked = settings.load(pipeline, overrides)
    try:
        created = run.store.get_json(run.key("config.json"))["created"]
    except MissingObjectError:
        created = datetime.now(UTC).isoformat(timespec="seconds")
    run.store.put_json(
        run.key("config.json"),
        {
            "run": run.id,
            "created": created,
            "pipeline": pipeline.name,
            "requested": overrides,
            "settings": checked.model_dump(mode="json"),
            "code_version": code_version(),
            "image": os.environ.get("RETRAIN_IMAGE"),
            "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        },
    )
    changed = f", {len(overrides)} settings given for this run" if overrides else ""
    return {"summary": f"{pipeline.name} is valid{changed}"}


def code_version() -> str:
    """The commit that runs: from the image's environment, else from git, else this package's version."""
    if commit := os.environ.get("RETRAIN_COMMIT"):
        return commit
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    root = Path(__file__).parent.parent
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git in an image
        answer = ""
    return answer or tasks.__version__
