"""A small client of Airflow's REST API: what a person would do in the UI to run a DAG and watch it."""

from __future__ import annotations

import graphlib
from typing import Any

import httpx

COMPONENTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")


class AirflowApi:
    """An Airflow and a user of it. Raises `httpx.HTTPError` where Airflow does not do what it is asked."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._login = {"username": user, "password": password}
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)  # loopback: by no proxy

    def unhealthy(self) -> list[str]:
        """The components that are not healthy yet."""
        try:
            answer = self._client.get("/api/v2/monitor/health")
            health = answer.json() if answer.is_success else {}
        except (httpx.TransportError, ValueError):
            return ["api-server"]
        return [name for name in COMPONENTS if health.get(name, {}).get("status") != "healthy"]

    def find_dag(self, dag_id: str) -> dict[str, Any] | None:
        """A DAG, or None while Airflow does not know it."""
        answer = self._ask("GET", f"/api/v2/dags/{dag_id}", missing_ok=True)
        return answer

    def import_errors(self) -> list[str]:
        """What is wrong with DAG files, by file."""
        errors = self._ask("GET", "/api/v2/importErrors")["import_errors"]
        return [f"{error['filename']}: {error['stack_trace'].strip()}" for error in errors]

    def pause(self, dag_id: str, paused: bool) -> None:
        """Switch a DAG off or on."""
        self._ask("PATCH", f"/api/v2/dags/{dag_id}", json={"is_paused": paused})

    def unfinished_runs(self, dag_id: str) -> list[str]:
        """The ids of the runs that are queued or running."""
        states = {"state": ["queued", "running"]}
        return [
            run["dag_run_id"] for run in self._ask("GET", f"/api/v2/dags/{dag_id}/dagRuns", params=states)["dag_runs"]
        ]

    def fail_run(self, dag_id: str, run_id: str) -> None:
        """Stop a run, as failed."""
        self._ask("PATCH", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}", json={"state": "failed"})

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Start a run with other settings than the file's, and return its id."""
        return self._ask("POST", f"/api/v2/dags/{dag_id}/dagRuns", json={"logical_date": None, "conf": conf})[
            "dag_run_id"
        ]

    def run_state(self, dag_id: str, run_id: str) -> str:
        """A run's state: `queued`, `running`, `success` or `failed`."""
        return self._ask("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")["state"]

    def task_order(self, dag_id: str) -> list[str]:
        """A DAG's tasks, each after those it waits for."""
        tasks = self._ask("GET", f"/api/v2/dags/{dag_id}/tasks")["tasks"]
        sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
        for task in tasks:
            sorter.add(task["task_id"])
            for follower in task["downstream_task_ids"]:
                sorter.add(follower, task["task_id"])
        return list(sorter.static_order())

    def task_instances(self, dag_id: str, run_id: str) -> dict[str, dict[str, Any]]:
        """A run's tasks, by id."""
        answer = self._ask("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances")
        return {task["task_id"]: task for task in answer["task_instances"]}

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int) -> list[str]:
        """The lines of a task's log so far."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        answer = self._ask("GET", path, missing_ok=True, headers={"accept": "application/json"})
        return [_text(entry) for entry in answer["content"]] if answer else []

    def _ask(self, method: str, path: str, *, missing_ok: bool = False, **request: Any) -> Any:
        if "authorization" not in self._client.headers:
            login = self._client.post("/auth/token", json=self._login)
            login.raise_for_status()
            self._client.headers["authorization"] = f"Bearer {login.json()['access_token']}"
        answer = self._client.request(method, path, **request)
        if missing_ok and answer.status_code == httpx.codes.NOT_FOUND:
            return None
        if answer.is_error:
            raise httpx.HTTPStatusError(
                f"Airflow refused {method} {path}: {answer.text}", request=answer.request, response=answer
            )
        return answer.json()


def _text(entry: Any) -> str:
    """A log entry's message, with the errors that are attached to it."""
    if isinstance(entry, str):
        return entry
    details = [f"{error['exc_type']}: {error['exc_value']}" for error in entry.get("error_detail") or []]
    return "\n".join([str(entry.get("event", "")), *details])
