"""The demo's DAG with every step in a pod, and what becomes of a task when its pod fails, each time for real."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from airflow.models.dagrun import DagRun
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from clusters import IMAGE, Cluster, Runner, role
from sqlalchemy import select

from plugins.links import PodLink
from tasks import registry

pytest_plugins = ["clusters"]

both = pytest.mark.parametrize("deferrable", [True, False], ids=["deferred", "waiting"])


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Everything in the tasks' logs so far."""
    return lambda: "".join(capfd.readouterr())


def states(dag_run: DagRun) -> dict[str, str | None]:
    return {task.task_id: task.state for task in dag_run.get_task_instances()}


@both
def test_the_demo_is_promoted_with_every_step_in_a_pod(
    deferrable: bool, runner: Runner, cluster: Cluster, tmp_path: Path, said: Callable[[], str]
) -> None:
    if cluster.kind == "stand-in" and not deferrable:
        pytest.skip("the tests below wait for stand-ins' pods often enough")
    changes = {"force": True, "gate.min_gain": None}  # the second time, the candidate is production's twin
    dag_run, run = runner.demo(changes, deferrable=deferrable)
    assert dag_run.state == "success"
    assert {task for task, state in states(dag_run).items() if state != "success"} == {"unchanged", "reject"}
    version = registry.pull(cluster.store, "demo", registry.PRODUCTION, tmp_path / "model")
    assert version == run.result("promote")["version"]
    assert registry.manifest(cluster.store, "demo", version).metadata["lineage"]["image"] == IMAGE
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
    gpu = {"requests": {"memory": "64Mi"}, "limits": {"memory": "4Gi", "nvidia.com/gpu": "1"}}
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
    assert re.search(
        r"StepFailedError: train: its container cannot start \((ErrImagePull|ImagePullBackOff)\): .*localhost:1",
        said(),
    )


SLEEP = ["sh", "-c", "sleep 120"]
FILL = 'head -c 5000000 /dev/zero > "${TMPDIR:-/tmp}/full"; sleep 120'


@both
def test_a_full_volume_reads_as_such(deferrable: bool, runner: Runner, said: Callable[[], str]) -> None:
    assert runner.step("train", deferrable=deferrable, scratch="1Mi", cmds=["sh", "-c", FILL]) == "failed"
    assert (
        'StepFailedError: train: the cluster ended its pod (Evicted): Usage of EmptyDir volume "scratch" exceeds the '
        'limit "1Mi"' in said()
    )


@both
def test_a_time_limit_ends_the_pod(deferrable: bool, runner: Runner, said: Callable[[], str]) -> None:
    limit = {"execution_timeout": timedelta(seconds=10)}
    assert runner.step("train", deferrable=deferrable, cmds=SLEEP, kwargs=limit) == "failed"
    assert re.search("StepFailedError: train: its pod was given up: .*(execution_timeout|Timeout)", said())


@both
def test_a_pod_that_somebody_deletes_reads_as_such(
    deferrable: bool, runner: Runner, cluster: Cluster, said: Callable[[], str]
) -> None:
    state = runner.step(
        "train",
        deferrable=deferrable,
        cmds=SLEEP,
        meanwhile=lambda: cluster.delete(cluster.wait_until_running(), grace=0),
    )
    assert state == "failed"
    assert "StepFailedError: train: its pod is gone: somebody deleted it, or its node was lost" in said()


@both
def test_a_pod_that_makes_room_for_another_is_tried_again(
    deferrable: bool, runner: Runner, cluster: Cluster, said: Callable[[], str]
) -> None:
    """Kubernetes says from 1.26 on that it was preempted; before, the pod is deleted, and reads as that."""
    if cluster.kind == "stand-in":
        pytest.skip("the stand-in has no scheduler; what clusters say is read in tests/unit/test_pod_specs.py")
    most_of_the_node = {"memory": f"{int(cluster.memory() * 0.6)}"}
    state = runner.step(
        "train",
        deferrable=deferrable,
        cmds=["sh", "-c", "trap 'exit 75' TERM; sleep 120 & wait"],
        resources={"requests": most_of_the_node, "limits": most_of_the_node},
        meanwhile=lambda: cluster.preempt(cluster.wait_until_running(), most_of_the_node),
    )
    assert state == "failed"
    assert re.search(
        r"StepFailedError: train(: its pod (is gone|was deleted)| failed with exit code 75|.*PreemptionByScheduler)",
        said(),
    )


@both
def test_a_pod_that_ends_because_it_is_deleted_reads_as_such(
    deferrable: bool, runner: Runner, cluster: Cluster, said: Callable[[], str]
) -> None:
    state = runner.step(
        "train",
        deferrable=deferrable,
        cmds=["sh", "-c", "trap 'echo stopped by SIGTERM; exit 75' TERM; sleep 120 & wait"],
        meanwhile=lambda: cluster.delete(cluster.wait_until_running()),
    )
    assert state == "failed"
    assert re.search(
        r"StepFailedError: train(: its pod (is gone|was deleted)| failed with exit code 75: stopped by SIGTERM)", said()
    )


# The result in the store counts, if it is this attempt's

CONFIGURE = {"pipeline_file": "config/demo.yaml"}
LINGER = ["sh", "-c", 'python -m tasks "$@"; sleep 120', "-"]


@both
def test_work_that_was_done_counts_though_its_pod_is_lost(
    deferrable: bool, runner: Runner, cluster: Cluster, said: Callable[[], str]
) -> None:
    run = f"lost-{deferrable}"

    def lose_the_pod_when_it_is_done() -> None:
        name = cluster.wait_until_running()
        wait_for(lambda: runner.run(run).find_result("configure"))
        cluster.delete(name, grace=0)

    state = runner.step(
        "configure",
        run=run,
        deferrable=deferrable,
        cmds=LINGER,
        kwargs=CONFIGURE,
        meanwhile=lose_the_pod_when_it_is_done,
    )
    assert state == "success"
    assert "The pod did not end well, but configure had been done" in said()


@both
def test_a_result_from_before_does_not_count(
    deferrable: bool, runner: Runner, cluster: Cluster, said: Callable[[], str]
) -> None:
    run = f"before-{deferrable}"
    assert runner.step("configure", run=run, deferrable=deferrable, kwargs=CONFIGURE) == "success"
    state = runner.step(  # another DAG run, and so another attempt
        "configure",
        run=run,
        deferrable=deferrable,
        cmds=SLEEP,
        kwargs=CONFIGURE,
        meanwhile=lambda: cluster.delete(cluster.wait_until_running(), grace=0),
    )
    assert state == "failed"
    assert "StepFailedError: configure: its pod is gone" in said()


@both
def test_the_link_to_the_pod_is_there_while_it_runs(
    deferrable: bool, runner: Runner, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRAIN_POD_URL", "https://dashboard.example/{namespace}/pods/{pod}")
    meanwhile = []

    def look_then_delete() -> None:
        name = cluster.wait_until_running()
        wait_for(links)
        meanwhile.append((name, links()))
        cluster.delete(name, grace=0)

    runner.step("train", run=f"linked-{deferrable}", deferrable=deferrable, cmds=SLEEP, meanwhile=look_then_delete)
    ((name, shown),) = meanwhile
    assert shown == links() == [f"https://dashboard.example/{cluster.namespace}/pods/{name}"]


def links() -> list[str]:
    """The address behind the button *Pod* of the last run, once there is one."""
    with create_session() as session:
        last = select(DagRun.run_id).order_by(DagRun.id.desc()).limit(1).scalar_subquery()
        wanted = select(XComModel.value).where(XComModel.key == PodLink().xcom_key, XComModel.run_id == last)
        return list(session.scalars(wanted))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def test_the_role_grants_what_airflow_has_done_so_far_and_no_more(cluster: Cluster) -> None:
    """After all tests of this file: each verb of the Role in `k8s/retrain.yaml` was needed."""
    assert cluster.used() == role()
