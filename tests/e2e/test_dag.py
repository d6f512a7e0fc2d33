"""The demo's whole DAG, run by Airflow without a scheduler: every step a real process, the store a real server.

One story in one bucket, told in order: the first run is promoted, a harmful setting is refused, the next run finds
nothing to do, and bad data fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.models.asset import AssetEvent
from airflow.models.dagrun import DagRun
from airflow.utils.session import create_session
from sqlalchemy import select

from plugins.pipelines import run_id
from scripts.demo import HARMFUL
from tasks import registry
from tasks.__main__ import STEPS, main
from tasks.run import Run
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"data.max_train_rows": 1500, "data.max_eval_rows": 150, "training.epochs": 2}
Finished = tuple[DagRun, Run]


@pytest.fixture(scope="module")
def trigger(bucket: Store, airflow_database: None) -> Callable[[dict[str, Any]], Finished]:
    """Run the demo's DAG to its end, with some settings changed."""

    def run_dag(settings: dict[str, Any]) -> Finished:
        dag = DagBag(ROOT / "dags").dags["retrain_demo"]
        dag_run = dag.test(run_conf={**SMALL, **settings})
        return dag_run, Run.at(f"s3://{bucket.bucket}/runs/{run_id('demo', dag_run.run_id)}")

    return run_dag


@pytest.fixture(scope="module")
def promoted(trigger: Callable[[dict[str, Any]], Finished]) -> Finished:
    """The first run: there is no production yet."""
    return trigger({})


@pytest.fixture(scope="module")
def rejected(promoted: Finished, trigger: Callable[[dict[str, Any]], Finished]) -> Finished:
    """A run with a harmful setting, after the first."""
    return trigger(HARMFUL)


def states(dag_run: DagRun) -> dict[str, str | None]:
    return {task.task_id: task.state for task in dag_run.get_task_instances()}


def asset_events(dag_run: DagRun) -> list[tuple[str, dict[str, Any]]]:
    """The address of each asset that the run announced, and what it said of it."""
    with create_session() as session:
        events = session.scalars(select(AssetEvent).where(AssetEvent.source_run_id == dag_run.run_id))
        return [(event.asset.uri, event.extra) for event in events]


def test_first_run_is_promoted(promoted: Finished, bucket: Store) -> None:
    dag_run, run = promoted
    assert dag_run.state == "success"
    ends = states(dag_run)
    assert {task for task, state in ends.items() if state != "success"} == {"unchanged", "reject"}
    gate = run.result("gate")
    assert gate["decision"] == "promote"
    assert all(check["passed"] for check in gate["checks"])
    pointer = registry.read_pointer(bucket, "demo")
    assert pointer
    assert pointer.version == run.result("promote")["version"]
    assert bucket.exists(run.key("report.html"))


def test_promotion_is_announced_with_the_version(promoted: Finished, bucket: Store) -> None:
    dag_run, run = promoted
    ((uri, extra),) = asset_events(dag_run)
    assert uri == f"s3://{bucket.bucket}/models/demo/production.json"
    about = {"pointer": uri, "metrics": run.result("evaluate")["bleu"]}
    assert extra == {"run": run.uri, **about, **run.result("promote")}


def test_a_service_can_pull_and_use_what_was_promoted(promoted: Finished, bucket: Store, tmp_path: Path) -> None:
    registry.pull(bucket, "demo", registry.PRODUCTION, tmp_path / "model")
    settings = promoted[1].settings
    answer = subprocess.run(
        [
            *[sys.executable, "-m", "scripts.before_after", settings.base_model.source],
            *[str(tmp_path / "model"), settings.preprocessing.prompt],
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"before"' in answer.stdout


@pytest.mark.parametrize("step", STEPS)
def test_every_step_run_again_finds_the_same(
    step: str, promoted: Finished, rejected: Finished, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a task is cleared, or tried again because its worker was lost at the very end."""
    monkeypatch.chdir(ROOT)
    run = (rejected if step == "reject" else promoted)[1]
    requested = [f"--set={name}={json.dumps(value)}" for name, value in run.config["requested"].items()]
    settings = ["--pipeline", "config/demo.yaml", *requested] if step == "configure" else []
    before = found(run, step)
    assert main([step, "--run", run.uri, *settings]) == 0
    assert found(run, step) == before
    pointer = registry.read_pointer(bucket, "demo")
    assert pointer
    assert pointer.event == 1


def test_every_task_is_a_step_or_only_shows_the_way(promoted: Finished) -> None:
    """So that the test above has all that do anything; those that show the way are cleared in `test_ui.py`."""
    assert set(states(promoted[0])) == {*STEPS, "changed", "decision", "unchanged"}


def found(run: Run, step: str) -> Any:
    """A step's result, without what differs from one time to the next: how long it took, what is in production."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(inner) for name, inner in value.items() if name != "seconds"}
        return [timeless(inner) for inner in value] if isinstance(value, list) else value

    result = timeless(run.store.get_json(run.key("results", f"{step}.json")))
    return {name: value for name, value in result.items() if step != "pull" or name not in ("summary", "changed")}


def test_second_run_stops_because_nothing_has_changed(
    promoted: Finished, trigger: Callable[[dict[str, Any]], Finished], bucket: Store
) -> None:
    before = registry.read_pointer(bucket, "demo")
    dag_run, run = trigger({})
    assert dag_run.state == "success"
    done = {task for task, state in states(dag_run).items() if state == "success"}
    assert done == {"configure", "pull", "changed", "unchanged", "report"}
    assert run.find_result("train") is None
    assert registry.read_pointer(bucket, "demo") == before
    assert asset_events(dag_run) == []
    assert bucket.exists(run.key("report.html"))


def test_harmful_setting_is_rejected(promoted: Finished, rejected: Finished, bucket: Store) -> None:
    dag_run, run = rejected
    assert dag_run.state == "success"
    ends = states(dag_run)
    assert (ends["reject"], ends["promote"]) == ("success", "skipped")
    assert run.result("gate")["decision"] == "reject"
    pointer = registry.read_pointer(bucket, "demo")
    assert pointer
    assert pointer.version == promoted[1].result("promote")["version"]
    assert asset_events(dag_run) == []
    assert bucket.exists(run.key("report.html"))


def test_failure_fails_the_run_at_once_and_is_still_reported(
    trigger: Callable[[dict[str, Any]], Finished], bucket: Store
) -> None:
    """Another try cannot make more data, so there is none."""
    dag_run, run = trigger({"validation.min_train_rows": 10_000_000})
    ends = states(dag_run)
    assert dag_run.state == "failed"
    assert ends["validate"] == "failed"
    assert ends["train"] == ends["promote"] == ends["reject"] == "upstream_failed"
    assert ends["report"] == "success"
    assert {task.try_number for task in dag_run.get_task_instances() if task.task_id == "validate"} == {1}
    assert bucket.exists(run.key("report.html"))


def test_wrong_setting_is_refused_before_anything_is_done(
    trigger: Callable[[dict[str, Any]], Finished], bucket: Store
) -> None:
    dag_run, run = trigger({"trianing.epochs": 1})
    ends = states(dag_run)
    assert dag_run.state == "failed"
    assert ends["configure"] == "failed"
    assert ends["pull"] == "upstream_failed"
    assert run.find_result("pull") is None
