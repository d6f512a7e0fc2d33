"""One pool of GPUs for every pipeline: made when Airflow starts, if there is none, so that nobody has to.

`RETRAIN_GPUS` is how many trainings may run at once when it is made; afterwards the pool is yours, in Airflow's UI.
A task in a pool that does not exist would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin

GPU_POOL = "retrain_gpu"


@hookimpl
def on_starting(component: Any) -> None:
    """Make the pool."""
    if type(component).__name__ != "Job":  # a task, which has no business in Airflow's database
        return
    from airflow.models.pool import Pool  # noqa: PLC0415  (brings the database)
    from sqlalchemy.exc import IntegrityError  # noqa: PLC0415

    if Pool.get_pool(GPU_POOL) is None:
        with contextlib.suppress(IntegrityError):  # another component starts at the same time
            Pool.create_or_update_pool(
                GPU_POOL,
                slots=int(os.environ.get("RETRAIN_GPUS") or "1"),
                description="Trainings and evaluations at once, over all pipelines",
                include_deferred=True,  # a deferred task's pod still has the GPU
            )


class GpuPool(AirflowPlugin):
    """The listener above, for Airflow to find."""

    name = "retrain_gpu_pool"
    listeners = [sys.modules[__name__]]  # noqa: RUF012  (as AirflowPlugin declares it)
