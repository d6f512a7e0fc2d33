"""The pipeline's own figures, beside Airflow's: gauges that Airflow sends where it sends its metrics.

They go to StatsD or OpenTelemetry as `[metrics]` of Airflow's configuration says, each with the tag `dag_id`.
`grafana/retrain.json` is a dashboard of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from airflow.sdk.observability import stats

log = logging.getLogger(__name__)


def emit(step: str, result: Mapping[str, Any], *, dag_id: str) -> None:
    """Send the figures of a step's result. A figure that is not there is no reason to fail what has been done."""
    try:
        for name, value, tags in figures(step, result):
            stats.gauge(f"retrain.{name}", value, tags={"dag_id": dag_id, **tags})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        log.warning("the result of %s lacks a figure for the metrics: %r", step, error)


def figures(step: str, result: Mapping[str, Any]) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Name, value and tags of each figure in a step's result."""
    yield "step_seconds", result["seconds"], {"step": step}
    match step:
        case "pull":
            yield "changed", float(result["changed"]), {}
        case "validate":
            for split, rows in result["usable"].items():
                yield "rows", rows, {"split": split}
            yield "rows_set_aside", sum(result["rows"].values()) - sum(result["usable"].values()), {}
        case "train":
            yield "training_loss", result["epochs"][-1]["training_loss"], {}
        case "evaluate":
            for system, score in result["bleu"].items():
                yield "bleu", score, {"system": system}
            for system, loss in result["validation_loss"].items():
                yield "validation_loss", loss, {"system": system}
        case "gate":
            yield "checks_failed", sum(not check["passed"] for check in result["checks"]), {}
        case "promote" | "reject":
            yield "promoted", float(step == "promote"), {}
    if "bytes" in result:
        yield "model_bytes", result["bytes"], {}
