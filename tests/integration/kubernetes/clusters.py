"""Where pods run in these tests: a stand-in on every machine, and a real cluster where KUBECONFIG names one.

For the real one: an administrator's KUBECONFIG, `kubectl`, the trainer image on its node (TEST_TRAINER_IMAGE), a MinIO
binary, this machine's address as pods see it (TEST_HOST_ADDRESS), and, to compare rights with, the API server's audit
log (TEST_AUDIT_LOG). Airflow has the rights of `k8s/retrain.yaml` in either, and no more.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.models.dagrun import DagRun
from airflow.sdk import DAG
from conftest import bucket_of, free_port, running_store
from kubernetes import client, config
from kubernetes.utils import parse_quantity
from pod_api import Cluster as StandIn

from plugins.pipelines import run_id
from plugins.retrain_operator import step_operator
from scripts import object_store
from tasks.run import Run
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[3]
HOST = os.environ.get("TEST_HOST_ADDRESS", "172.17.0.1")
IMAGE = os.environ.get("TEST_TRAINER_IMAGE", "retrain-trainer")
AUDIT_LOG = os.environ.get("TEST_AUDIT_LOG")
KUBECONFIG = os.environ.get("KUBECONFIG")
SMALL: dict[str, Any] = {"data.max_train_rows": 1500, "data.max_eval_rows": 150, "training.epochs": 2}
LITTLE = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "4Gi"}}


@dataclass
class Cluster:
    """Somewhere for pods to run: `api` is an administrator's client, `worker_config` is Airflow's kubeconfig."""

    kind: str
    api: client.CoreV1Api
    worker_config: Path
    namespace: str
    store: Store
    used: Callable[[], set[tuple[str, str]]]  # what Airflow has done: verb and resource, from the audit log

    def pods(self) -> list[client.V1Pod]:
        return self.api.list_namespaced_pod(self.namespace).items

    def wait_for_pod(self, accept: Callable[[client.V1Pod], bool], seconds: float = 120) -> client.V1Pod:
        """The first pod that is as it should be."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for pod in self.pods():
                if accept(pod):
                    return pod
            time.sleep(0.2)
        raise AssertionError(f"no such pod within {seconds} s; there are {[pod.status for pod in self.pods()]}")

    def wait_until_running(self) -> str:
        """The name of the pod, once its step runs."""
        runs = self.wait_for_pod(lambda pod: pod.status.phase == "Running" and not pod.metadata.deletion_timestamp)
        return runs.metadata.name

    def memory(self) -> int:
        """Bytes that the pods of the (only) node may ask for."""
        (node,) = self.api.list_node().items
        return int(parse_quantity(node.status.allocatable["memory"]))

    def preempt(self, name: str, requests: dict[str, str]) -> None:
        """Run a pod that needs so much, and is more important than the one with this name, until that is gone."""
        classes = client.SchedulingV1Api(self.api.api_client)
        important = client.V1PriorityClass(metadata=client.V1ObjectMeta(name=self.namespace), value=1000)
        container = {"name": "base", "image": IMAGE, "command": ["sleep", "120"], "resources": {"requests": requests}}
        spec = {"priorityClassName": self.namespace, "containers": [container], "terminationGracePeriodSeconds": 0}
        classes.create_priority_class(important)
        try:
            self.api.create_namespaced_pod(self.namespace, {"metadata": {"name": "important"}, "spec": spec})
            deadline = time.monotonic() + 120
            while name in [pod.metadata.name for pod in self.pods()]:
                assert time.monotonic() < deadline, f"{name} was not preempted"
                time.sleep(0.5)
        finally:
            self.delete("important", grace=0)
            classes.delete_priority_class(self.namespace)

    def delete(self, name: str, grace: int | None = None) -> None:
        self.api.delete_namespaced_pod(name, self.namespace, grace_period_seconds=grace)


def role() -> set[tuple[str, str]]:
    """What `k8s/retrain.yaml` lets Airflow do: verb and resource."""
    documents = yaml.safe_load_all((ROOT / "k8s" / "retrain.yaml").read_text())
    rules = next(document["rules"] for document in documents if document["kind"] == "Role")
    return {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    return subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=["stand-in", "real"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A stand-in for a cluster, then a real one."""
    folder = tmp_path_factory.mktemp("cluster")
    if request.param == "stand-in":
        with running_store("ministack", folder) as server, stand_in(folder, server) as cluster:
            yield cluster
    elif not KUBECONFIG:
        pytest.skip("KUBECONFIG names no cluster")
    elif object_store.find_minio(Path.home() / "go" / "bin") is None:
        pytest.skip("no minio binary in MINIO_BINARY, on PATH or in ~/go/bin")
    else:
        with real(folder) as cluster:
            yield cluster


@contextmanager
def stand_in(folder: Path, server: object_store.Server) -> Iterator[Cluster]:
    stand_in = StandIn(folder, {IMAGE}, role())
    with bucket_of(server) as store:
        stand_in.secrets["retrain-store"] = server.client_environment | {"NO_PROXY": "127.0.0.1"}

        def kubeconfig(name: str, token: str) -> Path:
            path = folder / name
            content = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": stand_in.url}}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "c",
            }
            path.write_text(yaml.safe_dump(content))
            return path

        admin = config.new_client_from_config(str(kubeconfig("admin", stand_in.admin_token)))
        worker = kubeconfig("worker", stand_in.worker_token)
        try:
            yield Cluster("stand-in", client.CoreV1Api(admin), worker, "retrain", store, lambda: stand_in.used)
        finally:
            stand_in.close()


@contextmanager
def real(folder: Path) -> Iterator[Cluster]:
    """A namespace with what `k8s/retrain.yaml` puts there, an account of its own, and a MinIO that pods reach."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    documents = (ROOT / "k8s" / "retrain.yaml").read_text()
    for original in ("retrain", "airflow"):
        documents = documents.replace(f"namespace: {original}\n", f"namespace: {name}\n")
    parts = list(yaml.safe_load_all(documents))
    parts[0]["metadata"]["name"] = name
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "airflow-worker", "namespace": name}}
    annotation = {"kubernetes.io/service-account.name": "airflow-worker"}
    token = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/service-account-token",
        "metadata": {"name": "worker-token", "namespace": name, "annotations": annotation},
    }
    server = object_store.server("minio", folder / "data", free_port(), object_store.Credentials.random())
    command = [part.replace(f"{object_store.HOST}:", f"{HOST}:") for part in server.command]
    variables = {**server.client_environment, "S3_ENDPOINT_URL": f"http://{HOST}:{server.port}"}
    process = subprocess.Popen(command, env={**os.environ, **server.environment}, stdout=subprocess.DEVNULL)
    try:
        server.wait_until_ready(process)  # MinIO listens on loopback besides
        kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([*parts, account, token]))
        literals = [f"--from-literal={name}={value}" for name, value in variables.items()]
        kubectl("-n", name, "create", "secret", "generic", "retrain-store", *literals)
        worker = yaml.safe_load(kubectl("config", "view", "--raw", "--minify", "--flatten"))
        secret = kubectl("-n", name, "get", "secret", "worker-token", "-o", "jsonpath={.data.token}")
        worker["users"] = [{"name": worker["users"][0]["name"], "user": {"token": base64.b64decode(secret).decode()}}]
        (folder / "worker").write_text(yaml.safe_dump(worker))
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {**variables, "NO_PROXY": f"{HOST},127.0.0.1", "RETRAIN_BUCKET": "pods"}.items():
                patch.setenv(variable, value)
            store = Store("pods")
            store.create_bucket()
            admin = config.new_client_from_config(KUBECONFIG)
            yield Cluster("real", client.CoreV1Api(admin), folder / "worker", name, store, lambda: audited(name))
    finally:
        kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
        process.terminate()
        process.wait(20)


def audited(namespace: str) -> set[tuple[str, str]]:
    """What the API server's audit log says that the namespace's accounts have done."""
    if not AUDIT_LOG:
        pytest.skip("TEST_AUDIT_LOG names no audit log of the cluster")
    used = set()
    for line in Path(AUDIT_LOG).read_text().splitlines():
        event = json.loads(line)
        if event["user"]["username"].startswith(f"system:serviceaccount:{namespace}:") and "objectRef" in event:
            resource = "/".join(filter(None, [event["objectRef"]["resource"], event["objectRef"].get("subresource")]))
            used.add((event["verb"], resource))
    return used


def write_templates(folder: Path, resources: Any = LITTLE, scratch: str = "1Gi") -> None:
    """Pods as in `k8s/pods/`, but as small as a test machine."""
    for kind in ("cpu", "gpu"):
        pod = yaml.safe_load((ROOT / "k8s" / "pods" / f"{kind}.yaml").read_text())
        pod["spec"]["containers"][0]["resources"] = resources
        pod["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] = scratch
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(pod))


@dataclass
class Runner:
    """Runs DAGs whose steps are pods of a cluster, by Airflow without a scheduler."""

    cluster: Cluster
    templates: Path
    patch: pytest.MonkeyPatch

    def set_up(self, *, deferrable: bool, resources: Any = LITTLE, scratch: str = "1Gi", image: str = IMAGE) -> None:
        """What Airflow has in its environment, and pods as small as a test machine."""
        write_templates(self.templates, resources, scratch)
        self.patch.delenv("KUBECONFIG", raising=False)  # the triggerer's hook would mix it with the connection's
        connection = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(self.cluster.worker_config)}}
        for name, value in {
            "AIRFLOW_CONN_KUBERNETES_DEFAULT": json.dumps(connection),
            "RETRAIN_RUNNER": "kubernetes",
            "RETRAIN_IMAGE": image,
            "RETRAIN_NAMESPACE": self.cluster.namespace,
            "RETRAIN_POD_TEMPLATES": str(self.templates),
            "RETRAIN_DEFERRABLE": str(deferrable),
            "NO_PROXY": f"{HOST},127.0.0.1",
            "no_proxy": f"{HOST},127.0.0.1",
        }.items():
            self.patch.setenv(name, value)

    def demo(self, settings: dict[str, Any], *, deferrable: bool) -> tuple[DagRun, Run]:
        """Run the demo's DAG, to its end."""
        self.set_up(deferrable=deferrable)
        dag = DagBag(ROOT / "dags").dags["retrain_demo"]
        for task in dag.tasks:
            task.retries = 0  # the tests do not wait for back-off
        dag_run = dag.test(run_conf={**SMALL, **settings})
        return dag_run, self.run(run_id("demo", dag_run.run_id))

    def run(self, name: str) -> Run:
        return Run.at(f"s3://{self.cluster.store.bucket}/runs/{name}")

    def step(
        self,
        step: str,
        *,
        run: str = "one-step",
        deferrable: bool = False,
        meanwhile: Callable[[], Any] = lambda: None,
        cmds: list[str] | None = None,
        kwargs: dict[str, Any] | None = None,
        **set_up: Any,
    ) -> str | None:
        """Run one step as the only task of a DAG, and something else at the same time; returns the task's state."""
        self.set_up(deferrable=deferrable, **set_up)
        with DAG(f"only_{step}", schedule=None) as dag:
            operator = step_operator(step, run_uri=self.run(run).uri, **(kwargs or {}))
            operator.poll_interval = operator.startup_check_interval_seconds = 1
            operator.schedule_timeout_seconds = 10
            operator.cmds = cmds or operator.cmds
        DagBundlesManager().sync_bundles_to_db()
        bag = DagBag(os.devnull)
        bag.bag_dag(dag)
        sync_bag_to_db(bag, "dags-folder", None)
        interference = threading.Thread(target=meanwhile)
        interference.start()
        dag_run = dag.test()
        interference.join()
        (task,) = dag_run.get_task_instances()
        return task.state


@pytest.fixture
def runner(
    cluster: Cluster, airflow_database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runner]:
    """Runs DAGs in the cluster; whatever becomes of them, no pod may be left that holds a node's resources."""
    yield Runner(cluster, tmp_path, monkeypatch)
    deadline = time.monotonic() + 60
    while left := [pod.metadata.name for pod in cluster.pods() if not pod.metadata.deletion_timestamp]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.5)
