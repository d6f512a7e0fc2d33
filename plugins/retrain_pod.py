"""The operator that runs a step of a pipeline in a pod, on a GPU where the step needs one.

What the pods are like is in `k8s/pods/cpu.yaml` and `gpu.yaml`, for whoever runs the cluster to edit. Set where Airflow
runs: `RETRAIN_IMAGE` (the trainer image), `RETRAIN_NAMESPACE`, and, if they differ from the defaults,
`RETRAIN_POD_TEMPLATES` (another folder with `cpu.yaml` and `gpu.yaml`), `RETRAIN_DEFERRABLE` (`false`: the worker
waits for the pod; by default the triggerer does, and no worker slot is held) and `RETRAIN_START_TIMEOUT` (seconds that
a pod may wait for a node, and then for its image).

A step's result in the store, not its pod, says whether it is done: a pod may be evicted, deleted with its node or
collected after its work has been finished. All tries of a task until somebody clears it are one *attempt*. The pod
gets the attempt's name, the step leaves it in its result, and only a result of the same attempt counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import generic_api_retry
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodNotFoundException
from airflow.sdk import Context
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import models as k8s
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from plugins.links import PodLink
from plugins.pipelines import ROOT
from plugins.retrain_operator import report_result, step_arguments
from plugins.store_connection import use_store_connection
from tasks.errors import NEVER_RETRY, SettingsError

ATTEMPT = "retrain-attempt"  # the pods' label; the step has the same in RETRAIN_ATTEMPT
LOG_INTERVAL = 10  # seconds between looks at a deferred task's pod for new lines of its log
SLACK = 600  # seconds that a pod may outlive its task's time limit, if nobody is left to delete it


class StepFailedError(AirflowException):
    """A step failed, and another try may succeed."""


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
        limit = kwargs.get("execution_timeout")
        super().__init__(
            pod_template_file=_template("gpu" if gpu else "cpu"),
            image=_required("RETRAIN_IMAGE", "the image that every step's pod runs"),
            namespace=_required("RETRAIN_NAMESPACE", "the Kubernetes namespace for the pods"),
            name=f"retrain-{step}",
            cmds=["python", "-m", "tasks"],
            do_xcom_push=False,  # would need a sidecar and exec rights; the result is in the store
            durable=True,
            deferrable=_switch("RETRAIN_DEFERRABLE", default=True),
            logging_interval=LOG_INTERVAL,
            # A GPU node may have to be started, and a large image pulled.
            startup_timeout_seconds=_seconds("RETRAIN_START_TIMEOUT", default=1800),
            active_deadline_seconds=int(limit.total_seconds()) + SLACK if limit else None,
            on_finish_action="delete_pod",
            on_kill_action="delete_pod",
            termination_message_policy="FallbackToLogsOnError",
            log_pod_spec_on_failure=False,  # a page of YAML would hide the reason
            container_name_log_prefix_enabled=False,
            **kwargs,
        )
        self.step = step
        self.run_uri = run_uri
        self.pipeline_file = pipeline_file
        self.place: tuple[str, str] | None = None  # the pod's namespace and name, once there is one
        self._last_look: k8s.V1Pod | None = None  # at the pod, before it was deleted
        self._gone = False

    def build_pod_request_obj(self, context: Context | None = None, *, dry_run: bool = False) -> k8s.V1Pod:
        """The pod, with the step's arguments, which are known only once the run is."""
        if context:
            self.arguments = step_arguments(self.step, self.run_uri, self.pipeline_file, context)
            # The image is for the model's lineage: a container cannot see which one it runs in.
            self.env_vars = {"RETRAIN_ATTEMPT": attempt_of(context), "RETRAIN_IMAGE": str(self.image)}
        return super().build_pod_request_obj(context, dry_run=dry_run)

    def get_or_create_pod(self, pod_request_obj: k8s.V1Pod, context: Context) -> k8s.V1Pod:
        """The pod, made or found again. Its link is shown from now on: Airflow itself waits until the pod is gone."""
        pod = super().get_or_create_pod(pod_request_obj, context)
        self.place = (pod.metadata.namespace, pod.metadata.name)
        for link in self.operator_extra_links:
            if isinstance(link, PodLink):
                context["ti"].xcom_push(key=link.xcom_key, value=link.get_link(self))
        return pod

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the pod; returns the step's result. In deferrable mode the task goes on in `trigger_reentry`."""
        use_store_connection()
        attempt = attempt_of(context)
        if context["ti"].try_number > 1 and self._has_result(attempt):
            self.log.info("%s was done by an earlier try, whose end nobody saw", self.step)
            self._end_pods(context)
            return self._report(context)
        self._end_pods(context, but_of=attempt)
        self.labels = {**self.labels, ATTEMPT: attempt}
        self.trigger_kwargs = {"attempt": attempt}
        return self._conclude(context, attempt, lambda: super(PodStep, self).execute(context))

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on after the pod has ended in deferrable mode."""
        use_store_connection()
        attempt = event["attempt"]
        self.place = (event["namespace"], event["name"])
        self.trigger_kwargs = {"attempt": attempt}
        return self._conclude(context, attempt, lambda: super(PodStep, self).trigger_reentry(context, event))

    def _conclude(self, context: Context, attempt: str, watch_pod: Callable[[], Any]) -> dict[str, Any]:
        """Watch the pod to its end, then believe the store rather than the pod. Raises with the one-line reason."""
        try:
            watch_pod()
        except (StepFailedError, AirflowFailException):
            raise  # a reason that was found already
        except (AirflowException, ApiException, HTTPError) as error:
            if self._killed:
                raise
            if not self._has_result(attempt):
                raise self._failure(error) from error
            self.log.warning("The pod did not end well, but %s had been done: %s", self.step, error)
        if not self._has_result(attempt):
            raise StepFailedError(f"{self.step}: the pod has ended and is no more, and left no result")
        return self._report(context)

    def _report(self, context: Context) -> dict[str, Any]:
        result = report_result(self, context)
        # `do_xcom_push=False`, which spares the pod a sidecar, also makes Airflow drop what a task returns.
        context["ti"].xcom_push(key=BaseXCom.XCOM_RETURN_KEY, value=result)
        return result

    def _has_result(self, attempt: str) -> bool:
        from tasks.run import Run  # noqa: PLC0415  (brings boto3, which the scheduler has no use for)

        result = Run.at(self.run_uri).find_result(self.step)
        return result is not None and result.get("attempt") == attempt

    def _end_pods(self, context: Context, but_of: str | None = None) -> None:
        """Delete this task's pods, but those of an attempt, and wait: two pods would write over each other's work."""
        selector = self._build_find_pod_label_selector(context, exclude_checked=False)
        selector += f",{ATTEMPT}!={but_of}" if but_of else ""
        asked: set[str] = set()
        deadline = time.monotonic() + SLACK
        while pods := self._list_pods(selector):
            for pod in pods:
                if pod.metadata.name not in asked:
                    asked.add(pod.metadata.name)
                    self.log.info("Deleting pod %s of an earlier try", pod.metadata.name)
                    self.pod_manager.delete_pod(pod)
            if time.monotonic() > deadline:
                raise StepFailedError(f"{self.step}: its earlier pod {pods[0].metadata.name} was deleted, but stays")
            time.sleep(2)

    @generic_api_retry
    def _list_pods(self, selector: str) -> list[k8s.V1Pod]:
        return self.client.list_namespaced_pod(self.namespace, label_selector=selector).items

    def cleanup(
        self,
        pod: k8s.V1Pod,
        remote_pod: k8s.V1Pod,
        xcom_result: dict[str, Any] | None = None,
        context: Context | None = None,
    ) -> None:
        """End a pod, after a last look at it for the reason of a failure."""
        if remote_pod and not self._killed:
            try:
                remote_pod = self._last_look = self.pod_manager.read_pod(remote_pod)
            except ApiException as error:
                self._gone = error.status == 404
        super().cleanup(pod, remote_pod, xcom_result, context)

    def _failure(self, error: Exception) -> AirflowException:
        """What to raise when the pod ended without a result: the reason, and whether to try again."""
        if self._last_look is None:
            # Deleted before the first look at it: it was made, and Kubernetes answers, but has it no more.
            vanished = self.place is not None and getattr(error, "status", 404) == 404
            if self._gone or (vanished and not isinstance(error, HTTPError)) or isinstance(error, PodNotFoundException):
                return StepFailedError(f"{self.step}: its pod is gone: somebody deleted it, or its node was lost")
            return StepFailedError(f"{self.step}: Kubernetes did not take or show its pod: {_api_message(error)}")
        reason, again = why_it_failed(self._last_look, self.base_container_name, error.__context__ or error)
        return (StepFailedError if again else AirflowFailException)(f"{self.step}{reason}")


def attempt_of(context: Context) -> str:
    """A name for all tries of this task until somebody clears a task of the run, or deletes the run."""
    run = context["dag_run"]
    identity = f"{run.dag_id} {run.run_id} {run.start_date} {run.clear_number} {context['ti'].task_id}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def why_it_failed(pod: k8s.V1Pod, container: str, error: BaseException) -> tuple[str, bool]:
    """Why a pod failed, in words that follow the step's name, and whether another try could succeed.

    `error` is what the watching ended with; it is the reason where the pod itself shows none.
    """
    states = [each.state for each in pod.status.container_statuses or [] if each.name == container and each.state]
    ended, waiting = (states[0].terminated, states[0].waiting) if states else (None, None)
    if ended and ended.exit_code in NEVER_RETRY:
        return f": {_last_line(ended)}", False
    if ended and ended.reason == "OOMKilled":
        return (
            " needed more memory than the pod may have (OOMKilled): raise its limit in the pod's template, or lower "
            "the batch size"
        ), False
    conditions = {condition.type: condition for condition in pod.status.conditions or []}
    disrupted = conditions.get("DisruptionTarget")  # Kubernetes 1.26 and later: preempted, drained, node shut down
    scheduled = conditions.get("PodScheduled")
    if pod.status.reason:
        reason = f": the cluster ended its pod ({pod.status.reason}): {pod.status.message or 'it does not say why'}"
    elif disrupted and disrupted.status == "True":
        reason = f": the cluster ended its pod ({disrupted.reason}): {disrupted.message}"
    elif ended:
        reason = f" failed with exit code {ended.exit_code}: {_last_line(ended)}"
    elif waiting and waiting.reason not in {None, "ContainerCreating", "PodInitializing"}:
        reason = f": its container cannot start ({waiting.reason}): {waiting.message or 'it does not say why'}"
    elif scheduled and scheduled.status != "True":
        reason = f": no node could take its pod ({scheduled.reason}): {scheduled.message}"
    elif pod.metadata.deletion_timestamp:
        reason = ": its pod was deleted, by somebody or with its node, before it was done"
    else:
        reason = f": its pod was given up: {error}"
    return reason, not (waiting and waiting.reason == "InvalidImageName")


def _last_line(ended: k8s.V1ContainerStateTerminated) -> str:
    lines = (ended.message or "").strip().splitlines()
    return lines[-1] if lines else ended.reason or "it said nothing"


def _api_message(error: Exception) -> str:
    with suppress(ValueError, TypeError, KeyError):
        return json.loads(getattr(error, "body", ""))["message"]
    return str(error)


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


def _seconds(name: str, *, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or not int(value):
        raise SettingsError(f"{name} is {value!r}: expected a number of seconds")
    return int(value)
