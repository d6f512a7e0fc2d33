"""The operator that runs a step of a pipeline in a pod, on a GPU where the step needs one.

What the pods are like is in `k8s/pods/cpu.yaml` and `gpu.yaml`, for whoever runs the cluster to edit. Set where Airflow
runs: `RETRAIN_IMAGE` (the trainer image), `RETRAIN_NAMESPACE`, and, if they differ from the defaults,
`RETRAIN_POD_TEMPLATES` (another folder with `cpu.yaml` and `gpu.yaml`) and `RETRAIN_DEFERRABLE` (`false`: the worker
waits for the pod; by default the triggerer does, and no worker slot is held).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import Context
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import models as k8s

from plugins.pipelines import ROOT
from plugins.retrain_operator import report_result, step_arguments
from tasks.errors import NEVER_RETRY, SettingsError


class PodStep(KubernetesPodOperator):
    """Runs a step as a pod, with as few rights as it needs, and finds the pod again when the worker is lost.

    :param step: the step's name, as in `python -m tasks STEP`
    :param run_uri: where the run is in the store (templated)
    :param pipeline_file: for `configure` only: the pipeline's file, as it is in the image
    :param gpu: use the template for pods with a GPU
    """

    template_fields = (*KubernetesPodOperator.template_fields, "run_uri")
    ui_color = "#dcfce7"
    ui_fgcolor = "#14532d"

    def __init__(
        self, *, step: str, run_uri: str, pipeline_file: str | None = None, gpu: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(
            pod_template_file=_template("gpu" if gpu else "cpu"),
            image=_required("RETRAIN_IMAGE", "the image that every step's pod runs"),
            namespace=_required("RETRAIN_NAMESPACE", "the Kubernetes namespace for the pods"),
            name=f"retrain-{step}",
            cmds=["python", "-m", "tasks"],
            do_xcom_push=False,  # would need a sidecar and exec rights; the result is in the store
            durable=True,
            deferrable=_switch("RETRAIN_DEFERRABLE", default=True),
            startup_timeout_seconds=1800,  # a GPU node may have to be started, and a large image pulled
            termination_message_policy="FallbackToLogsOnError",
            log_pod_spec_on_failure=False,  # a page of YAML would hide the reason
            container_name_log_prefix_enabled=False,
            **kwargs,
        )
        self.step = step
        self.run_uri = run_uri
        self.pipeline_file = pipeline_file

    def build_pod_request_obj(self, context: Context | None = None, *, dry_run: bool = False) -> k8s.V1Pod:
        """The pod, with the step's arguments, which are known only once the run is."""
        if context:
            self.arguments = step_arguments(self.step, self.run_uri, self.pipeline_file, context)
        return super().build_pod_request_obj(context, dry_run=dry_run)

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the pod; returns the step's result. In deferrable mode the task goes on in `trigger_reentry`."""
        super().execute(context)
        return self._report(context)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on after the pod has ended in deferrable mode."""
        super().trigger_reentry(context, event)
        return self._report(context)

    def _report(self, context: Context) -> dict[str, Any]:
        result = report_result(self, context)
        # `do_xcom_push=False`, which spares the pod a sidecar, also makes Airflow drop what a task returns.
        context["ti"].xcom_push(key=BaseXCom.XCOM_RETURN_KEY, value=result)
        return result

    def cleanup(
        self,
        pod: k8s.V1Pod,
        remote_pod: k8s.V1Pod,
        xcom_result: dict[str, Any] | None = None,
        context: Context | None = None,
    ) -> None:
        """End a pod; a failure that another try cannot cure is not retried. Raises with the step's one-line reason."""
        try:
            super().cleanup(pod, remote_pod, xcom_result, context)
        except AirflowException as error:
            ended = _ending(remote_pod, self.base_container_name)
            if ended and ended.exit_code in NEVER_RETRY:
                raise AirflowFailException(f"{self.step}: {(ended.message or '').strip()}") from error
            if ended and ended.reason == "OOMKilled":
                raise AirflowException(
                    f"{self.step} needed more memory than the pod may have (OOMKilled): raise its limit in the pod's "
                    f"template, or lower the batch size"
                ) from error
            raise


def _ending(pod: k8s.V1Pod, container: str) -> k8s.V1ContainerStateTerminated | None:
    """How a container ended, or None when it never did."""
    statuses = pod.status.container_statuses or []
    return next((status.state.terminated for status in statuses if status.name == container and status.state), None)


def _template(kind: str) -> str:
    folder = Path(os.environ.get("RETRAIN_POD_TEMPLATES") or ROOT / "k8s" / "pods")
    path = folder / f"{kind}.yaml"
    if not path.is_file():
        raise SettingsError(f"{path} does not exist: RETRAIN_POD_TEMPLATES must name a folder with cpu.yaml, gpu.yaml")
    return str(path)


def _required(name: str, meaning: str) -> str:
    if value := os.environ.get(name):
        return value
    raise SettingsError(f"{name} is not set: with RETRAIN_RUNNER=kubernetes it must name {meaning}")


def _switch(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, str(default)).lower()
    if value not in {"true", "false"}:
        raise SettingsError(f"{name} is {value!r}: expected true or false")
    return value == "true"
