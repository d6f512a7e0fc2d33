"""The demo's DAG with every step in a pod, and what becomes of a task when its pod fails, each time for real."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from airflow.models.dagrun import DagRun
from clusters import Cluster, Runner

from tasks import registry
from tasks.run import Run

pytest_plugins = ["clusters"]

both = pytest.mark.parametrize("deferrable", [True, False], ids=["deferred", "waiting"])


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Everything in the tasks' logs so far."""

    def read() -> str:
        text = "".join(capfd.readouterr())
        open("/tmp/said.log", "w").write(text)
        return text

    return read


def states(dag_run: DagRun) -> dict[str, str | None]:
    return {task.task_id: task.state for task in dag_run.get_task_instances()}


@both
def test_the_demo_is_promoted_with_every_step_in_a_pod(
    deferrable: bool, runner: Runner, cluster: Cluster, tmp_path: Path, said: Callable[[], str]
) -> None:
    changes = {"force": True, "gate.min_gain": -1}  # the second time, the candidate is production's twin
    dag_run, run = runner.demo(changes, deferrable=deferrable)
    assert dag_run.state == "success"
    assert {task for task, state in states(dag_run).items() if state != "success"} == {"unchanged", "reject"}
    version = registry.pull(cluster.store, "demo", registry.PRODUCTION, tmp_path / "model")
    assert version == run.result("promote")["version"]
    assert "train: done in" in said()  # the pods' own logs are the tasks'


# The step's own reasons


@both
def test_a_setting_that_is_refused_fails_at_once_with_its_sentence(
    deferrable: bool, runner: Runner, said: Callable[[], str]
) -> None:
    dag_run, _ = runner.demo({"trianing.epochs": 1}, deferrable=deferrable)
    assert states(dag_run)["configure"] == "failed"
    assert states(dag_run)["pull"] == "upstream_failed"
    assert "AirflowFailException: configure: config/demo.yaml: trianing: is not a setting" in said()


@both
def test_data_that_is_not_fit_fails_at_once_with_its_sentence(
    deferrable: bool, runner: Runner, said: Callable[[], str]
) -> None:
    assert runner.step("reject", run="never", deferrable=deferrable) == "failed"
    assert "AirflowFailException: reject: s3://" in (log := said())
    assert "has no result of the gate step: run it first" in log


# The cluster's reasons


@both
def test_too_little_memory_reads_as_such(deferrable: bool, runner: Runner, said: Callable[[], str]) -> None:
    little = {"requests": {"memory": "64Mi"}, "limits": {"memory": "200Mi"}}
    assert runner.step("train", deferrable=deferrable, resources=little) == "failed"
    assert "AirflowFailException: train needed more memory than the pod may have (OOMKilled)" in said()


@both
def test_a_gpu_that_the_cluster_lacks_reads_as_such(deferrable: bool, runner: Runner, said: Callable[[], str]) -> None:
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    assert runner.step("train", deferrable=deferrable, resources=gpu) == "failed"
    assert (
        "StepFailedError: train: no node could take its pod (Unschedulable): 0/1 nodes are available: "
        "1 Insufficient nvidia.com/gpu." in said()
    )


@both
def test_an_image_that_cannot_be_pulled_reads_as_such(
    deferrable: bool, runner: Runner, said: Callable[[], str]
) -> None:
    assert runner.step("train", deferrable=deferrable, image="localhost:1/none:never") == "failed"
    assert "StepFailedError: train: its container cannot start (ErrImagePull)" in (log := said())
    assert "localhost:1/none:never" in log
