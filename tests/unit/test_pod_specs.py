"""The pods that the DAG would submit, and the manifests: what Kubernetes' schema says of them, and what they may do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from airflow.configuration import conf
from airflow.dag_processing.dagbag import DagBag
from airflow.models.connection import Connection
from kubernetes.client import ApiClient
from kubernetes.client import models as k8s

from plugins.retrain_operator import step_operator
from plugins.retrain_pod import PodStep, attempt_of, why_it_failed
from tasks.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ["1.28", "1.37"]  # of Kubernetes: the oldest and the newest whose schemas are checked
STEPS = ["configure", "pull", "validate", "preprocess", "train", "evaluate", "gate", "promote", "reject", "report"]
FENCED = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
MANIFESTS = {
    "retrain.yaml": (ROOT / "k8s" / "retrain.yaml").read_text(),
    "scaling.md": "\n---\n".join(FENCED.findall((ROOT / "docs" / "scaling.md").read_text())),
}


@pytest.fixture(autouse=True)
def kubernetes_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUNNER": "kubernetes", "IMAGE": "registry/trainer:1", "NAMESPACE": "ml"}.items():
        monkeypatch.setenv(f"RETRAIN_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-key-of-the-store")


@pytest.fixture
def operators(kubernetes_runner: None) -> dict[str, PodStep]:
    """The steps of the pipeline as Airflow parses them."""
    dag = DagBag(ROOT / "dags").dags["retrain_en_es"]
    return {step: dag.get_task(step) for step in STEPS}


def context(task: str = "t", **changes: Any) -> Any:
    """What Airflow hands to an operator, as far as a pod's making looks at it."""
    run = {"dag_id": "d", "run_id": "r", "start_date": datetime(2026, 11, 24, tzinfo=UTC), "clear_number": 0}
    instance = SimpleNamespace(dag_id="d", task_id=task, map_index=-1, try_number=1)
    dag = SimpleNamespace(params={}, parent_dag=None)
    return {"dag_run": SimpleNamespace(**run | changes), "ti": instance, "run_id": "r", "dag": dag, "params": {}}


def rendered(operator: PodStep) -> dict[str, Any]:
    """The pod that the operator would submit, as JSON."""
    return ApiClient().sanitize_for_serialization(operator.build_pod_request_obj(context(), dry_run=True))


@pytest.mark.parametrize("step", STEPS)
def test_every_pod_fits_kubernetes_schema(step: str, operators: dict[str, PodStep]) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(rendered(operators[step]), version, strict=True)


@pytest.mark.parametrize("step", STEPS)
def test_every_pod_runs_the_same_command_with_few_rights(step: str, operators: dict[str, PodStep]) -> None:
    pod = rendered(operators[step])
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    assert [*container["command"], *container["args"]][:5] == ["python", "-m", "tasks", step, "--run"]
    assert container["image"] == "registry/trainer:1"
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    # What the namespace's label pod-security.kubernetes.io/enforce: restricted asks for, and a read-only disk.
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & {name for name, value in spec.items() if value}
    assert all("emptyDir" in volume for volume in spec["volumes"])
    assert "memory" in container["resources"]["limits"]
    assert spec["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] > operators[step].execution_timeout.total_seconds()


@pytest.mark.parametrize("step", STEPS)
def test_no_pod_holds_a_secret(step: str, operators: dict[str, PodStep]) -> None:
    pod = rendered(operators[step])
    (container,) = pod["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "retrain-store"}}]
    assert {variable["name"] for variable in container["env"]} - {"RETRAIN_DISK_LIMIT"} == {
        "HOME",
        "RETRAIN_ATTEMPT",
        "RETRAIN_IMAGE",
    }
    assert "the-key-of-the-store" not in json.dumps(pod)


def test_only_training_and_evaluation_ask_for_a_gpu(operators: dict[str, PodStep]) -> None:
    limits = {step: rendered(each)["spec"]["containers"][0]["resources"]["limits"] for step, each in operators.items()}
    assert [step for step in STEPS if "nvidia.com/gpu" in limits[step]] == ["train", "evaluate"]


def test_training_knows_how_much_disk_its_pod_may_use(operators: dict[str, PodStep]) -> None:
    pod = rendered(operators["train"])
    (container,) = pod["spec"]["containers"]
    (source,) = (each["valueFrom"] for each in container["env"] if each["name"] == "RETRAIN_DISK_LIMIT")
    assert source == {"resourceFieldRef": {"resource": "limits.ephemeral-storage"}}
    assert container["resources"]["limits"]["ephemeral-storage"] == pod["spec"]["volumes"][0]["emptyDir"]["sizeLimit"]


def test_how_tasks_wait_for_their_pods(operators: dict[str, PodStep]) -> None:
    for operator in operators.values():
        assert operator.deferrable
        assert operator.durable
        assert not operator.do_xcom_push
        assert operator.on_kill_action == operator.on_finish_action == "delete_pod"


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_fit_kubernetes_schema(manifest: str) -> None:
    documents = [each for each in yaml.safe_load_all(MANIFESTS[manifest]) if each]
    assert documents
    for document in documents:
        if not document["apiVersion"].startswith("kueue."):  # not Kubernetes' own
            for version in VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)


def test_the_chart_values_name_what_there_is() -> None:
    """Airflow's settings and this project's variables; the chart itself is not at hand."""
    values = yaml.safe_load((ROOT / "k8s" / "airflow-values.yaml").read_text())
    for section, options in values["config"].items():
        assert set(options) <= set(conf.configuration_description[section]["options"])
    variables = {each["name"]: each["value"] for each in values["env"]}
    assert all(isinstance(value, str) for value in variables.values())
    assert {Connection.from_json(value).conn_type for name, value in variables.items() if "_CONN_" in name} == {
        "kubernetes",
        "aws",
    }
    own = {name for name in variables if name.startswith("RETRAIN_")}
    documented = (ROOT / "docs" / "operations.md").read_text()
    assert all(f"`{name}`" in documented for name in own)
    assert values["airflowVersion"] == metadata.version("apache-airflow")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("RETRAIN_DEFERRABLE", "perhaps", "expected true or false"),
        ("RETRAIN_START_TIMEOUT", "1h", "expected a number of seconds"),
        ("RETRAIN_IMAGE", "", "must name the image"),
        ("RETRAIN_POD_TEMPLATES", "/nowhere", "must name a folder with cpu.yaml, gpu.yaml"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"{variable}.*{expected}|{expected}"):
        step_operator("train", run_uri="s3://b/runs/r")


# Attempts


def test_an_attempt_ends_when_something_is_cleared_or_the_run_is_made_anew() -> None:
    first = attempt_of(context())
    assert attempt_of(context()) == first
    assert attempt_of(context(clear_number=1)) != first
    assert attempt_of(context(start_date=datetime(2026, 11, 25, tzinfo=UTC))) != first
    assert attempt_of(context(task="another")) != first


# Why a pod failed: statuses as clusters report them


def pod(deleted: str | None = None, **status: Any) -> k8s.V1Pod:
    metadata = {"name": "p", "deletionTimestamp": deleted}
    answer = SimpleNamespace(data=json.dumps({"metadata": metadata, "status": status}))
    return ApiClient().deserialize(answer, "V1Pod")


def container(**state: Any) -> list[dict[str, Any]]:
    fields = {"name": "base", "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
    return [fields | {"state": state}]


def ended(code: int, message: str = "", reason: str = "Error") -> list[dict[str, Any]]:
    return container(terminated={"exitCode": code, "message": message, "reason": reason})


@pytest.mark.parametrize(
    ("status", "reason", "again"),
    [
        ({"containerStatuses": ended(78, "gate: x")}, ": gate: x", False),
        ({"containerStatuses": ended(65, "two\nlines")}, ": lines", False),
        ({"containerStatuses": ended(75, "stopped")}, " failed with exit code 75: stopped", True),
        ({"containerStatuses": ended(1)}, " failed with exit code 1: Error", True),
        ({"containerStatuses": ended(137, reason="OOMKilled")}, " needed more memory than", False),
        (
            {"reason": "Evicted", "message": "The node was low on resource: memory.", "containerStatuses": ended(137)},
            ": the cluster ended its pod (Evicted): The node was low on resource: memory.",
            True,
        ),
        ({"reason": "Evicted"}, ": the cluster ended its pod (Evicted): it does not say why", True),
        (
            {
                "containerStatuses": ended(75, "stopped"),
                "conditions": [
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "PreemptionByScheduler",
                        "message": "preempting to accommodate a higher priority pod",
                    }
                ],
            },
            ": the cluster ended its pod (PreemptionByScheduler): preempting to accommodate a higher priority pod",
            True,
        ),
        (
            {"containerStatuses": container(waiting={"reason": "ImagePullBackOff", "message": "not found"})},
            ": its container cannot start (ImagePullBackOff): not found",
            True,
        ),
        (
            {"containerStatuses": container(waiting={"reason": "InvalidImageName", "message": "no"})},
            ": its container cannot start (InvalidImageName): no",
            False,
        ),
        (
            {
                "containerStatuses": container(
                    waiting={"reason": "CreateContainerConfigError", "message": 'secret "retrain-store" not found'}
                )
            },
            ': its container cannot start (CreateContainerConfigError): secret "retrain-store" not found',
            True,
        ),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}
                ]
            },
            ": no node could take its pod (Unschedulable): no GPU",
            True,
        ),
        ({"containerStatuses": container(running={})}, ": its pod was given up: too slow", True),
        ({}, ": its pod was given up: too slow", True),
        ({"deleted": "2026-11-24T21:13:40Z"}, ": its pod was deleted, by somebody or with its node", True),
    ],
)
def test_a_failure_reads_as_what_it_is(status: dict[str, Any], reason: str, again: bool) -> None:
    found, worth_another_try = why_it_failed(pod(**status), "base", TimeoutError("too slow"))
    assert found.startswith(reason)
    assert worth_another_try is again


# The image of Airflow itself


LOAD = """
import json, sys
from importlib.metadata import packages_distributions
from airflow.dag_processing.dagbag import DagBag
bag = DagBag("dags")
assert not bag.import_errors, bag.import_errors
import plugins.alerts, plugins.approval, plugins.gpu_pool, plugins.links, plugins.metrics, plugins.retrain_pod
import tasks.run, tasks.registry
owners = packages_distributions()
print(json.dumps(sorted({owner for name in sys.modules for owner in owners.get(name.partition(".")[0], [])})))
"""


def test_dags_and_plugins_load_no_library_that_the_light_image_lacks() -> None:
    found = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {canonical(name) for name in json.loads(found.stdout.splitlines()[-1])}
    listed = re.findall(r"^([a-z][\w.-]+)", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    lock = re.findall(r"^([\w.-]+)==", (ROOT / "requirements-airflow.txt").read_text(), re.MULTILINE)
    lacking = {canonical(name) for name in listed} - {canonical(name) for name in lock}
    assert "tensorflow" in lacking
    assert "apache-airflow-core" in loaded
    assert loaded & lacking == set()


def test_the_locks_agree() -> None:
    """What two locks have in common is of one version: the images are tested by what is tested on a laptop."""
    locks = {
        name: dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / f"requirements{name}.txt").read_text(), re.MULTILINE))
        for name in ("", "-airflow", "-gpu")
    }
    for name in ("-airflow", "-gpu"):
        for library in locks[""].keys() & locks[name].keys():
            assert locks[name][library] == locks[""][library]
    assert "tensorflow" not in locks["-airflow"]
    assert set(locks[""]) <= set(locks["-gpu"])
    assert any(library.startswith("nvidia-cudnn") for library in locks["-gpu"])


def canonical(name: str) -> str:
    """A distribution's name as the package index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()
