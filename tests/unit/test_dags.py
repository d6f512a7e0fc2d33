"""The DAGs as Airflow reads them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pendulum
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, Asset
from airflow.serialization.serialized_objects import DagSerialization
from airflow.timetables.base import TimeRestriction
from airflow.timetables.trigger import CronTriggerTimetable

from plugins.gpu_pool import GPU_POOL
from tasks.errors import SettingsError
from tasks.settings import form_fields, load

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["tensorflow", "transformers", "pandas", "numpy", "great_expectations", "datasets", "boto3", "kubernetes"]
GPU = {"train", "evaluate"}
WORK = ["configure", "pull", "validate", "preprocess", "train", "evaluate", "gate", "promote", "reject"]


@pytest.fixture
def bag() -> DagBag:
    """Everything in dags/."""
    return DagBag(ROOT / "dags")


@pytest.fixture
def demo(bag: DagBag) -> DAG:
    """The demo's DAG."""
    return bag.dags["retrain_demo"]


def retraining(bag: DagBag) -> Iterator[DAG]:
    return (dag for name, dag in bag.dags.items() if name.startswith("retrain_"))


def test_each_file_in_config_is_a_dag(bag: DagBag) -> None:
    assert bag.import_errors == {}
    names = {load(file).name for file in (ROOT / "config").glob("*.yaml")}
    ids = {name.replace("-", "_") for name in names}
    assert set(bag.dags) == {f"{what}_{name}" for what in ("retrain", "rollback") for name in ids} | {
        "on_promotion",
        "prune",
    }


def test_flow(demo: DAG) -> None:
    def after(task: str) -> set[str]:
        return demo.get_task(task).downstream_task_ids

    chain = ["configure", "pull", "changed"]
    assert [after(task) for task in chain[:-1]] == [{task} for task in chain[1:]]
    assert after("changed") == {"validate", "unchanged"}
    chain = ["validate", "preprocess", "train", "evaluate", "gate", "decision"]
    assert [after(task) for task in chain[:-1]] == [{task} for task in chain[1:]]
    assert after("decision") == {"promote", "reject"}
    assert after("promote") == after("reject") == after("unchanged") == {"report"}
    assert after("report") == set()


def test_report_runs_whatever_happens_and_does_not_decide_the_outcome(demo: DAG) -> None:
    report = demo.get_task("report")
    assert report.is_teardown
    assert not report.on_failure_fail_dagrun
    assert report.trigger_rule == "all_done_setup_success"


def test_params_are_the_settings(demo: DAG) -> None:
    fields = form_fields(load(ROOT / "config" / "demo.yaml"))
    fields = {name: field for name, field in fields.items() if not field.get("expert")}
    assert set(demo.params) == set(fields)
    for name, field in fields.items():
        param = demo.params.get_param(name)
        assert param.value == field["default"]
        assert param.description == field.get("description")
        assert param.schema["section"] == field["section"]


def test_params_refuse_what_the_settings_refuse(demo: DAG) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    for name, value in {"training.epochs": 0, "training.learning_rate": "fast", "gate.max_empty": 2}.items():
        with pytest.raises(ParamValidationError):
            demo.params.get_param(name).resolve(value)


def test_tasks_are_retried_limited_and_explained(bag: DagBag) -> None:
    for dag in bag.dags.values():
        assert dag.doc_md
        assert not dag.catchup
        assert dag.max_active_runs == 1
    for dag in retraining(bag):
        for task in dag.tasks:
            assert task.task_display_name != task.task_id
            assert task.doc_md
        for name in [*WORK, "report"]:
            task = dag.get_task(name)
            assert task.retries > 0
            assert task.retry_exponential_backoff == 2
            assert task.execution_timeout
            assert f"python -m tasks {name}" in task.doc_md


def test_only_promote_announces_the_model(demo: DAG) -> None:
    outlets = {task.task_id: task.outlets for task in demo.tasks if task.outlets}
    assert set(outlets) == {"promote"}
    (asset,) = outlets["promote"]
    assert isinstance(asset, Asset)
    assert asset.uri == "s3://retrain/models/demo/production.json"


def test_switching_a_dag_on_starts_no_run_for_a_time_gone_by(demo: DAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a weekly DAG that is switched on within 17 hours of its time starts at once."""
    an_hour_late = pendulum.datetime(2026, 11, 23, 5, tz="UTC")  # a Monday; the demo's time is four o'clock
    monkeypatch.setattr("airflow.timetables.trigger.utcnow", lambda: an_hour_late)
    timetable = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(demo)).timetable
    assert isinstance(timetable, CronTriggerTimetable)
    info = timetable.next_dagrun_info_v2(last_dagrun_info=None, restriction=TimeRestriction(None, None, catchup=False))
    assert info
    assert info.run_after == pendulum.datetime(2026, 11, 30, 4, tz="UTC")


def test_dags_survive_serialization(bag: DagBag) -> None:
    """What the scheduler and the UI work with; it must be small and without code."""
    for dag in bag.dags.values():
        again = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))
        assert set(again.task_dict) == set(dag.task_dict)


def test_dag_files_import_nothing_heavy() -> None:
    """Reading a DAG file happens every half minute and before every task, in the scheduler's own processes."""
    program = f"""
import runpy, sys
import airflow.sdk, airflow.providers.standard.operators.empty  # what Airflow itself brings is not the file's fault
before = set(sys.modules)
for file in ("prune", "retrain", "unusable_pipelines"):
    runpy.run_path(f"dags/{{file}}.py")
print(*[name for name in {HEAVY} if name in set(sys.modules) - before])
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pipelines with the demo's in it."""
    (tmp_path / "good.yaml").write_text((ROOT / "config" / "demo.yaml").read_text())
    monkeypatch.setenv("RETRAIN_CONFIG", str(tmp_path))
    return tmp_path


def test_broken_file_is_an_import_error_and_the_others_stay(configs: Path) -> None:
    text = (configs / "good.yaml").read_text()
    (configs / "broken.yaml").write_text(
        text.replace("name: demo", "name: broken").replace("epochs: 4", "epochs: many")
    )
    (configs / "torn.yaml").write_text("name: [")
    bag = DagBag(ROOT / "dags")
    assert set(bag.dags) == {"retrain_demo", "rollback_demo", "on_promotion", "prune"}
    ((file, error),) = bag.import_errors.items()
    assert file.endswith("unusable_pipelines.py")
    assert "broken.yaml: training.epochs: " in error
    assert "found 'many'" in error
    assert "torn.yaml: cannot be read as YAML" in error


def test_two_files_with_one_name_are_an_import_error(configs: Path) -> None:
    (configs / "second.yaml").write_text((configs / "good.yaml").read_text())
    bag = DagBag(ROOT / "dags")
    assert set(bag.dags) == {"retrain_demo", "rollback_demo", "on_promotion", "prune"}
    assert "second.yaml: name: 'demo' is taken by" in next(iter(bag.import_errors.values()))


def test_schedule_that_is_none_is_an_import_error(configs: Path) -> None:
    text = (configs / "good.yaml").read_text().replace("name: demo", "name: late")
    (configs / "late.yaml").write_text(re.sub("schedule: .*", "schedule: every monday", text))
    bag = DagBag(ROOT / "dags")
    assert set(bag.dags) == {"retrain_demo", "rollback_demo", "on_promotion", "prune"}
    assert "late.yaml: schedule: expected a cron expression" in next(iter(bag.import_errors.values()))


def test_no_file_at_all_is_an_import_error(configs: Path) -> None:
    (configs / "good.yaml").unlink()
    bag = DagBag(ROOT / "dags")
    assert "has no pipeline" in next(iter(bag.import_errors.values()))


@pytest.mark.parametrize("runner", ["", "docker"])
def test_missing_or_unknown_runner_is_an_import_error(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRAIN_RUNNER", runner)
    (error,) = DagBag(ROOT / "dags").import_errors.values()
    assert f"RETRAIN_RUNNER is '{runner}': set it" in error


def test_the_same_dag_runs_in_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUNNER": "kubernetes", "IMAGE": "registry/trainer:1", "NAMESPACE": "ml"}.items():
        monkeypatch.setenv(f"RETRAIN_{name}", value)
    bag = DagBag(ROOT / "dags")
    assert bag.import_errors == {}
    dag = bag.dags["retrain_en_es"]
    templates = {task.task_id: Path(task.pod_template_file) for task in dag.tasks if task.task_id in {*WORK, "report"}}
    with_gpu = {name for name, template in templates.items() if "nvidia.com/gpu: " in template.read_text()}
    assert with_gpu == {"train", "evaluate"}
    DagSerialization.serialize_dag(dag)


@pytest.mark.parametrize("missing", ["RETRAIN_IMAGE", "RETRAIN_NAMESPACE"])
def test_pods_need_an_image_and_a_namespace(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from plugins.retrain_operator import step_operator

    for name, value in {"RUNNER": "kubernetes", "IMAGE": "registry/trainer:1", "NAMESPACE": "ml"}.items():
        monkeypatch.setenv(f"RETRAIN_{name}", value)
    monkeypatch.delenv(missing)
    with pytest.raises(SettingsError, match=f"{missing} is not set"):
        step_operator("train", run_uri="s3://b/runs/r")


def test_a_person_decides_where_the_settings_say_so(configs: Path) -> None:
    text = (configs / "good.yaml").read_text().replace("name: demo", "name: careful")
    (configs / "careful.yaml").write_text(text + "\napproval: human\noperation: {approval_hours: 5}\n")
    dag = DagBag(ROOT / "dags").dags["retrain_careful"]
    approval = dag.get_task("approval")
    assert dag.get_task("gate").downstream_task_ids == {"preview", "decision"}
    assert dag.get_task("decision").downstream_task_ids == {"approval", "reject"}
    assert approval.downstream_task_ids == {"promote", "reject"}
    assert (approval.response_timeout, approval.defaults) == (timedelta(hours=5), ["Reject"])


def test_rolling_back_needs_a_version_and_a_reason(bag: DagBag) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    dag = bag.dags["rollback_demo"]
    assert dag.schedule is None
    assert not dag.is_paused_upon_creation
    for name, wrong in {"version": "../../secrets", "reason": " "}.items():
        with pytest.raises(ParamValidationError):
            dag.params.get_param(name).resolve(wrong)
        assert dag.params.get_param(name).resolve("2026-11-24-abc")


@pytest.mark.parametrize(
    ("run_type", "ticked", "deletes"),
    [("manual", False, False), ("manual", True, True), ("scheduled", False, True)],
)
def test_the_store_is_pruned_on_schedule_and_by_hand_only_when_it_is_said(
    run_type: str, ticked: bool, deletes: bool, bag: DagBag
) -> None:
    dag = bag.dags["prune"]
    context: Any = {"params": {"delete": ticked, "keep": 3, "days": 20}, "dag_run": SimpleNamespace(run_type=run_type)}
    said = {}
    for task in dag.tasks:
        task.render_template_fields(context)
        said[task.task_id] = [argument for argument in task.arguments if argument]
    how = ["--bucket", "retrain", *([] if deletes else ["--dry-run"])]
    assert said == {
        "versions_demo": ["models", "prune", "demo", "--keep", "3", *how],
        "versions_en_es": ["models", "prune", "en-es", "--keep", "3", *how],
        "runs": ["prune-runs", "--days", "20", *how],
    }


def test_the_gpu_is_shared_by_priority(configs: Path) -> None:
    text = (configs / "good.yaml").read_text().replace("name: demo", "name: urgent")
    (configs / "urgent.yaml").write_text(f"{text}\noperation: {{priority: 9}}\n")
    bag = DagBag(ROOT / "dags")
    for name, priority in {"retrain_demo": 5, "retrain_urgent": 9}.items():
        tasks = {task.task_id: task for task in bag.dags[name].tasks}
        assert {name for name, task in tasks.items() if task.pool == GPU_POOL} == GPU
        assert {tasks[step].priority_weight for step in GPU} == {priority}
        assert {tasks[step].weight_rule for step in GPU} == {"absolute"}


def test_what_follows_a_promotion_waits_for_any_model(bag: DagBag) -> None:
    uris = {asset.uri for asset in bag.dags["on_promotion"].timetable.asset_condition.objects}
    assert uris == {f"s3://retrain/models/{name}/production.json" for name in ("demo", "en-es")}


def test_twenty_pipelines_are_read(configs: Path) -> None:
    """How long it takes: docs/operations.md; a test must not depend on the machine."""
    text = (configs / "good.yaml").read_text()
    for number in range(19):
        (configs / f"{number}.yaml").write_text(text.replace("name: demo", f"name: pair-{number}"))
    bag = DagBag(ROOT / "dags")
    assert bag.import_errors == {}
    assert len(bag.dags) == 42
