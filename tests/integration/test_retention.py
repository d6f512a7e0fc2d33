"""What is deleted and what never is: old versions, files that nothing names, uploads that nobody finished."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks import artifacts, registry, retention
from tasks.__main__ import main
from tasks.errors import DataError
from tasks.storage import Store, StoreUnreachableError

MODEL = "m"
COMMON = b"the frozen layers" * 1000


def publish(store: Store, tmp_path: Path, version: str) -> str:
    directory = tmp_path / version
    directory.mkdir()
    (directory / "frozen.safetensors").write_bytes(COMMON)
    (directory / "trained.safetensors").write_text(version)
    registry.publish(store, MODEL, version, directory, {"version": version})
    return version


def in_days(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def prune(store: Store, keep: int, days: int = 0) -> retention.Plan:
    plan = retention.plan_versions(store, MODEL, keep, in_days(days))
    retention.carry_out(store, plan, model=MODEL, who="somebody", why="old")
    return plan


def pulled(store: Store, tmp_path: Path, version: str) -> bool:
    registry.pull(store, MODEL, version, tmp_path / "pulled")
    return (tmp_path / "pulled" / "trained.safetensors").read_text() == version


def test_what_is_recent_or_named_stays(store: Store, tmp_path: Path) -> None:
    names = [publish(store, tmp_path, str(number)) for number in range(6)]
    registry.move(store, MODEL, "1", expected=None, who="w", why="y")
    registry.move(store, MODEL, "0", expected=None, who="w", why="y", alias="staging")
    plan = prune(store, 2)
    assert plan.versions == ["2", "3"]
    assert not plan.objects
    assert registry.versions(store, MODEL) == ["0", "1", "4", "5"]
    assert [event.action for event in registry.history(store, MODEL)] == ["move", "move", "expire", "expire"]
    for version in registry.versions(store, MODEL):
        assert pulled(store, tmp_path, version)
    assert prune(store, 2).versions == []
    gone = f"{MODEL} has no version '2'"
    for forget in (registry.expire, registry.withdraw):
        with pytest.raises(DataError, match=gone):
            forget(store, MODEL, "2", who="w", why="y")
    with pytest.raises(DataError, match=gone):
        registry.move(store, MODEL, "2", expected="1", who="w", why="y")
    assert set(names) - {"2", "3"} == set(registry.versions(store, MODEL))


def test_files_go_a_day_after_the_last_version_that_names_them(store: Store, tmp_path: Path) -> None:
    for number in range(3):
        publish(store, tmp_path, str(number))
    prune(store, 1)
    assert registry.versions(store, MODEL) == ["2"]
    files = list(store.list("models/m/files/"))
    assert len(files) == 4  # the shared one, and one of each version
    assert not prune(store, 1).objects  # somebody may be pulling them
    assert len(list(store.list("models/m/files/"))) == 4
    assert len(prune(store, 1, days=2).objects) == 2
    assert len(list(store.list("models/m/files/"))) == 2
    assert pulled(store, tmp_path, "2")
    assert not prune(store, 1, days=2).objects


def test_a_version_that_has_expired_does_not_come_back(store: Store, tmp_path: Path) -> None:
    for number in range(2):
        publish(store, tmp_path, str(number))
    prune(store, 1)
    with pytest.raises(DataError, match="m had a version '0', which has expired and cannot come back"):
        registry.publish(store, MODEL, "0", tmp_path / "0", {"version": "0"})
    assert registry.versions(store, MODEL) == ["1"]


@pytest.mark.parametrize("calls", range(3))
def test_an_expiry_that_died_is_done_by_the_next_writer(calls: int, store: Store, tmp_path: Path) -> None:
    class Dying(Store):
        left = calls

        def _count(self) -> None:
            if not self.left:
                raise StoreUnreachableError("the connection was cut")
            self.left -= 1

        def put(self, *args: Any, **more: Any) -> str:
            self._count()
            return super().put(*args, **more)

        def delete(self, key: str) -> None:
            self._count()
            super().delete(key)

    for number in range(2):
        publish(store, tmp_path, str(number))
    registry.require_conditional_writes(store, MODEL)  # whose own writes are not meant
    with pytest.raises(StoreUnreachableError):
        registry.expire(Dying(store.bucket), MODEL, "0", who="w", why="y")
    registry.move(store, MODEL, "1", expected=None, who="w", why="y")
    assert registry.versions(store, MODEL) == (["1"] if calls else ["0", "1"])


def test_what_was_uploaded_in_part_goes_when_it_is_a_day_old(bucket: Store, tmp_path: Path) -> None:
    """Not on MinIO, which tidies up itself, and lists such uploads only by their exact key."""
    store = bucket
    publish(store, tmp_path, "1")
    store.put("models/m/files/" + "0" * 64, b"a version that was never finished")
    upload = store._client.create_multipart_upload(Bucket=store.bucket, Key="models/m/files/" + "1" * 64)
    store._client.upload_part(
        Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"], PartNumber=1, Body=b"part"
    )
    young = prune(store, 1)
    assert (young.objects, young.uploads) == ([], [])
    old = prune(store, 1, days=2)
    assert [entry.key[-64:] for entry in old.objects] == ["0" * 64]
    assert [entry.key[-64:] for entry, _ in old.uploads] == ["1" * 64]
    assert not list(store.unfinished_uploads("models/m/"))
    assert pulled(store, tmp_path, "1")


def test_what_stands_in_an_alias_does_not_expire(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path, "1")
    registry.move(store, MODEL, "1", expected=None, who="w", why="y", alias="staging")
    for forget in (registry.expire, registry.withdraw):
        with pytest.raises(DataError, match="staging of m is 1: move staging to another version first"):
            forget(store, MODEL, "1", who="w", why="y")
    assert pulled(store, tmp_path, "1")


def test_old_runs_lose_what_is_heavy_and_keep_what_explains_them(store: Store, tmp_path: Path) -> None:
    (tmp_path / "candidate").mkdir()
    (tmp_path / "candidate" / "model.safetensors").write_bytes(b"weights")
    artifacts.publish(store, "runs/r/candidate", tmp_path / "candidate")
    light = ["runs/r/config.json", "runs/r/gate.json", "runs/r/report.html", "runs/candidate/results/train.json"]
    for key in [*light, "runs/r/checkpoints/1/model.safetensors", "models/m/production.json"]:
        store.put(key, b"{}")
    assert not retention.plan_runs(store, 30).objects
    plan = retention.plan_runs(store, 30, in_days(31))
    assert len(plan.objects) == 3
    retention.carry_out(store, plan)
    assert [entry.key for entry in store.list("")] == sorted([*light, "models/m/production.json"])


def test_a_dry_run_deletes_nothing(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        publish(store, tmp_path, str(number))
    before = [entry.key for entry in store.list("")]
    prune = ["models", "prune", MODEL, "--keep", "1", "--bucket", store.bucket]
    assert main([*prune, "--dry-run"]) == 0
    assert "version 0: neither among the last 1" in capsys.readouterr().out
    assert main(["prune-runs", "--bucket", store.bucket, "--dry-run"]) == 0
    assert [entry.key for entry in store.list("")] == before
    assert main(prune) == 0
    assert "2 versions, 0 objects (0 bytes) and 0 unfinished uploads were deleted" in capsys.readouterr().out
    assert registry.versions(store, MODEL) == ["2"]
    with pytest.raises(SystemExit):
        main([*prune, "--keep", "0"])
