"""The policies in docs/policies, on MinIO: each role can do its work, and not another's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from conftest import bucket_of
from test_registry import MODEL, judged

import retrain_models
from scripts import object_store
from tasks import artifacts, promote, registry, reject, retention
from tasks.run import Run
from tasks.storage import Store, StoreRefusedError

POLICIES = Path(__file__).resolve().parents[2] / "docs" / "policies"
As = Callable[[str], AbstractContextManager[Store]]


@pytest.fixture
def owned(minio: object_store.Server, tmp_path: Path) -> Iterator[Store]:
    """A bucket in MinIO with a model in production."""
    with bucket_of(minio) as store:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("first")
        registry.publish(store, MODEL, "1", tmp_path / "model", {})
        registry.move(store, MODEL, "1", expected=None, who="w", why="y")
        yield store


@pytest.fixture
def acting_as(owned: Store, minio: object_store.Server) -> As:
    """The same bucket with a key that has the policy of a role, and no more."""

    @contextmanager
    def role(name: str) -> Iterator[Store]:
        policy = (POLICIES / f"{name}.json").read_text().replace("BUCKET", owned.bucket)
        tokens = boto3.client(
            "sts",
            endpoint_url=minio.endpoint,
            region_name="us-east-1",
            aws_access_key_id=minio.credentials.access_key,
            aws_secret_access_key=minio.credentials.secret_key,
        )
        key = tokens.assume_role(RoleArn="arn:aws:iam::0:role/x", RoleSessionName=name, Policy=policy)["Credentials"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
            patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
            patch.setenv("AWS_SESSION_TOKEN", key["SessionToken"])
            yield Store(owned.bucket)

    return role


def refuses(permission: str, act: Callable[[], object]) -> None:
    with pytest.raises(StoreRefusedError, match=f"lack the permission {permission} for this prefix"):
        act()


def move(store: Store, version: str) -> None:
    registry.move(store, MODEL, version, expected="1", who="w", why="y")


def test_a_reader_reads_models_and_writes_nothing(owned: Store, acting_as: As, tmp_path: Path) -> None:
    registry.publish(owned, MODEL, "2", tmp_path / "model", {})
    owned.put("runs/r/config.json", b"{}")
    with acting_as("reader") as store:
        assert retrain_models.pull(MODEL, "production", tmp_path / "pulled").version == "1"
        assert next(retrain_models.watch(MODEL)) == "1"
        assert len(registry.history(store, MODEL)) == 1
        refuses("s3:PutObject", lambda: move(store, "2"))
        refuses("s3:PutObject", lambda: store.upload(Path(__file__), "models/m/files/x"))
        refuses("s3:GetObject", lambda: store.get("runs/r/config.json"))
        refuses("s3:ListBucket", lambda: list(store.list("runs/")))
        refuses("s3:DeleteObject", lambda: store.delete(registry.pointer_key(MODEL)))
    assert registry.resolve(owned, MODEL, "production") == "1"


def test_a_trainer_leaves_candidates_and_cannot_promote(owned: Store, acting_as: As, tmp_path: Path) -> None:
    run = judged(owned, tmp_path, "r1", "promote", "1")
    with acting_as("trainer") as store:
        for prefix in ("datasets/d", "base-models/b", "prepared/p", "runs/r2/candidate", "mirrors/m"):
            artifacts.publish(store, prefix, tmp_path / "model")
            artifacts.fetch(store, prefix, tmp_path / "copy")
        assert registry.champion_of(store, MODEL, "r2") == "1"
        refuses("s3:PutObject", lambda: promote.run(Run.at(run.uri)))
        refuses("s3:PutObject", lambda: store.put(registry.pointer_key(MODEL), b"{}"))
        assert reject.run(judged(store, tmp_path, "r3", "reject", "1"))["production"] == "1"
    assert registry.versions(owned, MODEL) == ["1"]
    assert len(registry.history(owned, MODEL)) == 1


def test_a_promoter_promotes_and_rolls_back_and_cannot_delete(owned: Store, acting_as: As, tmp_path: Path) -> None:
    run = judged(owned, tmp_path, "r1", "promote", "1")
    with acting_as("promoter") as store:
        promoted = Run.at(run.uri)
        version = promote.run(promoted)["version"]
        promoted.save_result("promote", {"version": version})
        registry.move(store, MODEL, "1", expected=version, who="w", why="rude")
        registry.withdraw(store, MODEL, version, who="w", why="rude")
        refuses("s3:DeleteObject", lambda: store.delete(registry.event_key(MODEL, 1)))
        refuses("s3:PutObject", lambda: store.put("runs/r1/gate.json", b"{}"))
        refuses("s3:PutObject", lambda: store.put("datasets/d/dataset.json", b"{}"))
    assert [event.action for event in registry.history(owned, MODEL)] == ["move", "move", "move", "withdraw"]


def test_a_pruner_deletes_what_is_old_and_cannot_touch_the_rest(owned: Store, acting_as: As, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text("second")
    for version in ("2", "3"):
        registry.publish(owned, MODEL, version, tmp_path / "model", {})
    judged(owned, tmp_path, "r1", "promote", "1")
    later = datetime.now(UTC) + timedelta(days=40)
    with acting_as("pruner") as store:
        for now in (None, later):
            plan = retention.plan_versions(store, MODEL, 1, now)
            retention.carry_out(store, plan, model=MODEL, who="w", why="y")
        retention.carry_out(store, retention.plan_runs(store, 30, later))
        for key in (registry.pointer_key(MODEL), registry.event_key(MODEL, 1), "runs/r1/config.json"):
            refuses("s3:DeleteObject", lambda key=key: store.delete(key))
        refuses("s3:PutObject", lambda: store.put("models/m/files/" + "0" * 64, b""))
    assert registry.versions(owned, MODEL) == ["1", "3"]
    assert not list(owned.list("runs/r1/candidate/"))
    assert retrain_models.pull(MODEL, "production", tmp_path / "pulled").version == "1"


def test_the_policies_name_no_more_than_the_bucket() -> None:
    for path in POLICIES.glob("*.json"):
        for statement in json.loads(path.read_text())["Statement"]:
            assert all(resource.startswith("arn:aws:s3:::BUCKET") for resource in statement["Resource"])
            assert all("*" not in action for action in statement["Action"])
