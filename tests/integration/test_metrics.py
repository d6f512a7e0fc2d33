"""The pipeline's figures arrive where Airflow sends its metrics, and the dashboard asks for those and no others."""

from __future__ import annotations

import gzip
import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from plugins import metrics

ROOT = Path(__file__).resolve().parents[2]
RESULTS: dict[str, dict[str, Any]] = {
    "pull": {"seconds": 1.5, "changed": True, "rows": {"train": 90, "test": 10}},
    "validate": {"seconds": 1, "rows": {"train": 90, "test": 10}, "usable": {"train": 88, "test": 10}},
    "train": {"seconds": 9, "epochs": [{"training_loss": None}, {"training_loss": 1.25}]},
    "evaluate": {
        "seconds": 2,
        "bleu": {"candidate": 31.5, "champion": 30.0},
        "validation_loss": {"candidate": 1.5, "champion": 1.75},
    },
    "gate": {"seconds": 0, "checks": [{"passed": True}, {"passed": False}]},
    "promote": {"seconds": 1, "version": "v", "bytes": 4096},
    "reject": {"seconds": 1},
}


def sent() -> set[str]:
    """The names of everything that any step sends."""
    return {name for step, result in RESULTS.items() for name, _, _ in metrics.figures(step, result)}


def test_figures_of_the_steps() -> None:
    found = {
        (step, name, *tags.values()): value
        for step, r in RESULTS.items()
        for name, value, tags in metrics.figures(step, r)
    }
    assert found["evaluate", "bleu", "candidate"] == 31.5
    assert found["validate", "rows", "train"] == 88
    assert found["validate", "rows_set_aside"] == 2
    assert found["train", "training_loss"] == 1.25
    assert found["gate", "checks_failed"] == 1
    assert (found["promote", "promoted"], found["reject", "promoted"]) == (1, 0)
    assert found["promote", "model_bytes"] == 4096


def test_dashboard_asks_for_what_is_sent() -> None:
    dashboard = (ROOT / "grafana" / "retrain.json").read_text()
    asked = set(re.findall(r"airflow_retrain_(\w+?)\b", dashboard))
    assert asked == sent()
    json.loads(dashboard)


@pytest.mark.parametrize("step", sorted(RESULTS))
def test_figure_that_is_missing_fails_nothing(step: str, caplog: pytest.LogCaptureFixture) -> None:
    metrics.emit(step, {"seconds": 1}, dag_id="retrain_demo")
    metrics.emit(step, {}, dag_id="retrain_demo")
    assert "lacks a figure for the metrics: KeyError('seconds')" in caplog.text


class Collector(BaseHTTPRequestHandler):
    """As much of an OpenTelemetry collector as it takes to be sent metrics."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        request = ExportMetricsServiceRequest.FromString(body)
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.gauge.data_points:
                        tags = {tag.key: tag.value.string_value for tag in point.attributes}
                        self.server.received.append((metric.name, point.as_double or point.as_int, tags))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def emit_with(**variables: str) -> None:
    """Send the figures of `evaluate` from a process of its own, whose Airflow has these in its environment."""
    program = f"""
import os
os.environ.update({variables!r})
from airflow.sdk.observability import stats
from airflow.observability.metrics.stats_utils import get_stats_factory
stats.initialize(factory=get_stats_factory(), export_legacy_names=False)  # as Airflow does for every task
from plugins import metrics
metrics.emit("evaluate", {RESULTS["evaluate"]!r}, dag_id="retrain_demo")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_figures_arrive_at_a_collector() -> None:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.received = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    emit_with(
        AIRFLOW__METRICS__OTEL_ON="True",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
    )
    server.shutdown()
    server.server_close()
    tags = {"dag_id": "retrain_demo", "system": "candidate"}
    assert ("airflow.retrain.bleu", 31.5, tags) in server.received


def test_figures_arrive_at_statsd_with_their_tags() -> None:
    """Without tags the BLEU of candidate and champion, and of every pipeline, would be one figure."""
    pytest.importorskip("statsd", reason="statsd is not installed: `make setup lint` installs requirements-dev.txt")
    values = yaml.safe_load((ROOT / "k8s" / "airflow-values.yaml").read_text())["config"]["metrics"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(10)
        emit_with(
            AIRFLOW__METRICS__STATSD_ON="True",
            AIRFLOW__METRICS__STATSD_PORT=str(listener.getsockname()[1]),
            **{f"AIRFLOW__METRICS__{name.upper()}": value for name, value in values.items()},
        )
        sent = {listener.recv(1000).decode() for _ in metrics.figures("evaluate", RESULTS["evaluate"])}
    assert "airflow.retrain.bleu,dag_id=retrain_demo,system=candidate:31.5|g" in sent
    assert "airflow.retrain.bleu,dag_id=retrain_demo,system=champion:30.0|g" in sent
