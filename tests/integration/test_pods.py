"""The demo's DAG with every step in a pod of a real cluster, and what people read when a pod fails.

Needs KUBECONFIG (an administrator's), the trainer image on the cluster's node (TEST_TRAINER_IMAGE) and a MinIO binary.
TEST_HOST_ADDRESS is this machine's address as pods see it. Airflow uses a service account with the rights of
`k8s/retrain.yaml`, and no more.
"""

from __future__ import annotations

import base64
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.dag_processing.dagbag import DagBag
from airflow.models.dagrun import DagRun
from conftest import free_port

from plugins.pipelines import run_id
from scripts import object_store
from tasks import registry
from tasks.run import Run
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
HOST = os.environ.get("TEST_HOST_ADDRESS", "172.17.0.1")
IMAGE = os.environ.get("TEST_TRAINER_IMAGE", "retrain-trainer")
SMALL: dict[str, Any] = {"data.max_train_rows": 1500, "data.max_eval_rows": 150, "training.epochs": 2}
LITTLE = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "4Gi"}}
Outcome = tuple[DagRun, Run]

pytestmark = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    return subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace with what `k8s/retrain.yaml` puts there, for a service account of its own."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    documents = (ROOT / "k8s" / "retrain.yaml").read_text()
    documents = documents.replace("namespace: retrain", f"namespace: {name}").replace(
        "namespace: airflow", f"namespace: {name}"
    )
    parts = list(yaml.safe_load_all(documents))
    parts[0]["metadata"]["name"] = name
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "airflow-worker", "namespace": name}}
    token = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/service-account-token",
        "metadata": {
            "name": "worker-token",
            "namespace": name,
            "annotations": {"kubernetes.io/service-account.name": "airflow-worker"},
        },
    }
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([*parts, account, token]))
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def pod_store(namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A MinIO that pods reach, its key in the namespace's Secret."""
    server = object_store.server(
        "minio", tmp_path_factory.mktemp("data"), free_port(), object_store.Credentials.random()
    )
    command = [part.replace(f"{object_store.HOST}:", f"{HOST}:") for part in server.command]
    variables = {**server.client_environment, "S3_ENDPOINT_URL": f"http://{HOST}:{server.port}"}
    process = subprocess.Popen(command, env={**os.environ, **server.environment}, stdout=subprocess.DEVNULL)
    try:
        server.wait_until_ready(process)  # MinIO listens on loopback besides
        literals = [f"--from-literal={name}={value}" for name, value in variables.items()]
        kubectl("-n", namespace, "create", "secret", "generic", "retrain-store", *literals)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**variables, "NO_PROXY": f"{HOST},127.0.0.1", "RETRAIN_BUCKET": "pods"}.items():
                patch.setenv(name, value)
            store = Store("pods")
            store.create_bucket()
            yield store
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def worker_config(namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cluster as Airflow's service account sees it."""
    config = yaml.safe_load(kubectl("config", "view", "--raw", "--minify", "--flatten"))
    token = base64.b64decode(kubectl("-n", namespace, "get", "secret", "worker-token", "-o", "jsonpath={.data.token}"))
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token.decode()}}]
    path = tmp_path_factory.mktemp("kube") / "config"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def run_dag(
    namespace: str,
    pod_store: Store,
    worker_config: Path,
    airflow_database: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Outcome]:
    """Run the demo's DAG in pods; `pods` changes the pods' templates, `tasks` attributes of the tasks."""

    def run(settings: dict[str, Any], *, deferrable: bool = False, resources: Any = LITTLE, **tasks: Any) -> Outcome:
        for kind in ("cpu", "gpu"):
            pod = yaml.safe_load((ROOT / "k8s" / "pods" / f"{kind}.yaml").read_text())
            pod["spec"]["containers"][0]["resources"] = resources if kind == "gpu" else LITTLE
            (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(pod))
        for name, value in {
            "KUBECONFIG": str(worker_config),
            "AIRFLOW_CONN_KUBERNETES_DEFAULT": "kubernetes://",
            "RETRAIN_RUNNER": "kubernetes",
            "RETRAIN_IMAGE": tasks.pop("image", IMAGE),
            "RETRAIN_NAMESPACE": namespace,
            "RETRAIN_POD_TEMPLATES": str(tmp_path),
            "RETRAIN_DEFERRABLE": str(deferrable),
            "NO_PROXY": f"{HOST},127.0.0.1",
            "no_proxy": f"{HOST},127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        dag = DagBag(ROOT / "dags").dags["retrain_demo"]
        for task in dag.tasks:
            task.retries = 0  # the tests do not wait for back-off
            for name, value in tasks.items():
                setattr(task, name, value)
        dag_run = dag.test(run_conf={**SMALL, **settings})
        return dag_run, Run.at(f"s3://{pod_store.bucket}/runs/{run_id('demo', dag_run.run_id)}")

    return run


def states(dag_run: DagRun) -> dict[str, str | None]:
    return {task.task_id: task.state for task in dag_run.get_task_instances()}


@pytest.fixture(autouse=True)
def no_pod_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever became of the run, it leaves no pod that holds a node's resources."""
    yield
    if "namespace" in request.fixturenames:
        left = kubectl("-n", request.getfixturevalue("namespace"), "get", "pods", "-o", "name")
        assert left == ""


@pytest.mark.parametrize("deferrable", [True, False])
def test_the_demo_is_promoted_with_every_step_in_a_pod(
    deferrable: bool, run_dag: Callable[..., Outcome], pod_store: Store, tmp_path: Path
) -> None:
    changes = {"force": True, "gate.min_gain": -1}  # the second time, the candidate is production's twin
    dag_run, run = run_dag(changes, deferrable=deferrable)
    assert dag_run.state == "success"
    assert {task for task, state in states(dag_run).items() if state != "success"} == {"unchanged", "reject"}
    assert registry.pull(pod_store, "demo", registry.PRODUCTION, tmp_path / "model") == run.result("promote")["version"]


def test_a_setting_that_is_refused_in_the_pod_fails_at_once_with_its_sentence(
    run_dag: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    dag_run, _ = run_dag({"trianing.epochs": 1})
    assert states(dag_run)["configure"] == "failed"
    assert states(dag_run)["pull"] == "upstream_failed"
    assert "configure: config/demo.yaml: trianing: is not a setting" in "".join(capfd.readouterr())


def test_data_that_is_not_fit_fails_at_once_with_its_sentence(
    run_dag: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    dag_run, run = run_dag({"validation.min_train_rows": 10_000, "force": True})
    assert states(dag_run)["validate"] == "failed"
    assert "validate: the corpus is not fit for training" in "".join(capfd.readouterr())
    assert run.store.exists(run.key("report.html"))


def test_too_little_memory_reads_as_such(run_dag: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]) -> None:
    little = {"requests": {"memory": "64Mi"}, "limits": {"memory": "200Mi"}}
    dag_run, _ = run_dag({"force": True}, resources=little)
    assert states(dag_run)["train"] == "failed"
    assert "train needed more memory than the pod may have (OOMKilled)" in "".join(capfd.readouterr())


def test_a_gpu_that_the_cluster_lacks_reads_as_such(
    run_dag: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    dag_run, _ = run_dag({"force": True}, resources={"limits": {"nvidia.com/gpu": "1"}}, schedule_timeout_seconds=15)
    assert states(dag_run)["train"] == "failed"
    assert "Insufficient nvidia.com/gpu" in "".join(capfd.readouterr())


def test_an_image_that_cannot_be_pulled_reads_as_such(
    run_dag: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    dag_run, _ = run_dag({}, image="localhost:1/none:never", startup_timeout_seconds=20, schedule_timeout_seconds=20)
    assert states(dag_run)["configure"] == "failed"
    assert "localhost:1/none:never" in "".join(capfd.readouterr())
