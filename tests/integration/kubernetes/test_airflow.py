"""A whole Airflow whose tasks are pods of a real cluster, and what people and failing machines do to it.

One run of the demo's DAG in each mode, in order: its training pod is deleted, what watches it is killed, the task is
marked as failed, cleared, and cleared again while it runs.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from clusters import HOST, Cluster, write_templates
from conftest import free_port
from kubernetes.client import V1Pod

from scripts.stack import Stack

pytest_plugins = ["clusters"]
pytestmark = pytest.mark.timeout(2400)

DAG = "retrain_demo"
LONG = {"training.epochs": 100, "training.batch_size": 4, "force": True}


class Airflow:
    """The local stack with its steps as pods, and one run of the demo."""

    def __init__(self, stack: Stack, cluster: Cluster, deferrable: bool, extra: dict[str, str]) -> None:
        self.stack, self.cluster, self.deferrable, self.extra = stack, cluster, deferrable, extra
        self.run = ""

    def task(self, name: str = "train") -> dict[str, Any]:
        return self.stack.api().task_instances(DAG, self.run)[name]

    def set_state(self, state: str) -> None:
        path = f"/api/v2/dags/{DAG}/dagRuns/{self.run}/taskInstances/train"
        self.stack.api()._ask("PATCH", path, json={"new_state": state})

    def clear(self) -> None:
        body = {"dry_run": False, "dag_run_id": self.run, "task_ids": ["train"], "only_failed": False}
        self.stack.api()._ask("POST", f"/api/v2/dags/{DAG}/clearTaskInstances", json=body)

    def log(self, try_number: int) -> str:
        return "\n".join(self.stack.api().log(DAG, self.run, "train", try_number))

    def training_pod(self) -> V1Pod | None:
        """The pod that trains, unless it is being deleted."""
        pods = [pod for pod in self.cluster.pods() if pod.metadata.labels.get("task_id") == "train"]
        pods = [pod for pod in pods if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp]
        assert len(pods) <= 1
        return pods[0] if pods else None

    def wait_for_training(self, but: str = "") -> str:
        """The name of the pod that trains, once it does."""

        def trains() -> str | None:
            pod = self.training_pod()
            if pod is None or pod.metadata.name == but:
                return None
            log = self.cluster.api.read_namespaced_pod_log(pod.metadata.name, self.cluster.namespace)
            return pod.metadata.name if re.search(r"epoch \d", log) else None

        return wait_for(trains, 900)

    def kill_what_watches(self) -> None:
        """SIGKILL: of the worker and the task's process, or of the triggerer, which then is started again."""
        background = self.stack._background
        if self.deferrable:
            triggerer = background.find("triggerer")
            assert triggerer
            for process in [*triggerer.children(recursive=True), triggerer]:
                process.kill()
            wait_for(lambda: background.find("triggerer") is None)
            self.stack.up(print, self.extra)
            return
        scheduler = background.find("scheduler")
        assert scheduler
        busy = [worker for worker in scheduler.children(recursive=True) if len(worker.children()) == 1]
        for worker in busy:
            for process in [*worker.children(recursive=True), worker]:
                process.kill()


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """What the condition gives, once it holds; the time is for a machine with much else to do."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["deferred", "waiting"])
def airflow(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Airflow]:
    if cluster.kind != "real":
        pytest.skip("only on a real cluster: it takes ten minutes")
    folder = tmp_path_factory.mktemp("airflow")
    write_templates(folder)
    connection = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(cluster.worker_config)}}
    extra = {
        "AIRFLOW_CONN_KUBERNETES_DEFAULT": json.dumps(connection),
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
        "RETRAIN_RUNNER": "kubernetes",
        "RETRAIN_IMAGE": os.environ.get("TEST_TRAINER_IMAGE", "retrain-trainer"),
        "RETRAIN_NAMESPACE": cluster.namespace,
        "RETRAIN_POD_TEMPLATES": str(folder),
        "RETRAIN_DEFERRABLE": str(request.param),
        "NO_PROXY": f"{HOST},127.0.0.1",
        "no_proxy": f"{HOST},127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KUBECONFIG", raising=False)
        patch.setenv("RETRAIN_AIRFLOW_PORT", str(free_port()))
        stack = Stack(folder / "stack")
        airflow = Airflow(stack, cluster, request.param, extra)
        stack.up(print, extra)
        try:
            wait_for(lambda: stack.api().find_dag(DAG))
            stack.api().pause(DAG, False)
            airflow.run = stack.api().trigger(DAG, LONG)
            yield airflow
        finally:
            if airflow.run:
                stack.api().fail_run(DAG, airflow.run)
            stack.down()


def test_a_pod_deleted_in_mid_training_is_tried_again_and_goes_on(airflow: Airflow) -> None:
    first = airflow.wait_for_training()
    wait_for(lambda: "epoch 1" in airflow.log(1))  # the pod's log is the task's, while it runs
    airflow.cluster.delete(first)  # SIGTERM first, as when a node is drained or a pod preempted
    second = airflow.wait_for_training(but=first)
    assert second != first
    assert airflow.task()["try_number"] == 2
    # Which of these is said depends on what is seen first: the end of the step, or that the pod is being deleted.
    assert re.search("its pod was deleted|its pod is gone|failed with exit code 75: stopped by SIGTERM", airflow.log(1))
    pod_says = airflow.cluster.api.read_namespaced_pod_log(second, airflow.cluster.namespace)
    assert "going on from a checkpoint" in pod_says
    wait_for(lambda: "going on from a checkpoint" in airflow.log(2))


def test_when_what_watches_a_pod_is_killed_the_pod_is_found_again(airflow: Airflow) -> None:
    pod = airflow.wait_for_training()
    number = airflow.task()["try_number"]
    airflow.kill_what_watches()
    if not airflow.deferrable:
        wait_for(lambda: airflow.task()["try_number"] > number and airflow.task()["state"] == "running")
    wait_for(lambda: airflow.task()["state"] in {"running", "deferred"})
    time.sleep(15)
    assert airflow.training_pod().metadata.name == pod


def test_a_task_marked_as_failed_leaves_no_pod(airflow: Airflow) -> None:
    airflow.wait_for_training()
    airflow.set_state("failed")
    wait_for(lambda: airflow.training_pod() is None)
    time.sleep(5)
    assert airflow.task()["state"] == "failed"


def test_a_task_that_is_cleared_while_it_runs_gets_a_pod_of_its_own(airflow: Airflow) -> None:
    airflow.clear()
    before = airflow.wait_for_training()
    airflow.clear()
    wait_for(lambda: airflow.training_pod() is None or airflow.training_pod().metadata.name != before)
    after = airflow.wait_for_training(but=before)
    assert after != before


def test_a_run_marked_as_failed_leaves_no_pod(airflow: Airflow) -> None:
    airflow.wait_for_training()
    airflow.stack.api().fail_run(DAG, airflow.run)
    wait_for(lambda: not [pod for pod in airflow.cluster.pods() if not pod.metadata.deletion_timestamp])
