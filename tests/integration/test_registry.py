"""Versions, the pointer to production and its history, on real servers, with many writers and with crashes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrain_models.registry import stored_pointer
from tasks import artifacts, progress, promote, registry, reject
from tasks.errors import DataError
from tasks.registry import Event, ProductionMovedError
from tasks.run import Run
from tasks.storage import Store, StoreUnreachableError

MODEL = "m"


@pytest.fixture
def publish(tmp_path: Path) -> Callable[[Store, str], str]:
    """Publish a version of a model that says its name."""

    def make(store: Store, version: str) -> str:
        directory = tmp_path / "versions" / version
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(version)
        registry.publish(store, MODEL, version, directory, {"version": version})
        return version

    return make


def move(store: Store, version: str, expected: str | None, who: str = "run") -> Event:
    return registry.move(store, MODEL, version, expected=expected, who=who, why="better")


def check_history(store: Store) -> list[Event]:
    """The history, after a look at whether it is one line that ends where production is."""
    events = registry.history(store, MODEL)
    pointer = registry.read_pointer(store, MODEL)
    assert pointer
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.before for event in events] == [None, *(event.version for event in events[:-1])]
    assert (pointer.event, pointer.version) == (events[-1].number, events[-1].version)
    assert pointer.version in registry.versions(store, MODEL)
    return events


def test_production_moves_from_version_to_version(store: Store, publish: Callable[[Store, str], str]) -> None:
    assert registry.read_pointer(store, MODEL) is None
    assert registry.versions(store, MODEL) == []
    move(store, publish(store, "1"), None)
    move(store, publish(store, "2"), "1")
    move(store, "1", "2")  # back again: a new event, not a deletion
    assert [event.version for event in check_history(store)] == ["1", "2", "1"]
    assert registry.versions(store, MODEL) == ["1", "2"]


def test_a_move_that_is_repeated_is_one_move(store: Store, publish: Callable[[Store, str], str]) -> None:
    first = move(store, publish(store, "1"), None)
    assert move(store, "1", None) == first
    assert len(check_history(store)) == 1


def test_a_candidate_that_was_compared_with_another_version_does_not_move_production(
    store: Store, publish: Callable[[Store, str], str]
) -> None:
    move(store, publish(store, "1"), None)
    move(store, publish(store, "2"), "1")
    for expected in ("1", None, "9"):
        with pytest.raises(ProductionMovedError, match="production of m is 2, not"):
            move(store, publish(store, f"3-{expected}"), expected)
    assert len(check_history(store)) == 2


def test_of_many_promoters_exactly_one_wins(store: Store, publish: Callable[[Store, str], str]) -> None:
    before = None
    for attempt in range(3):
        candidates = [publish(store, f"{attempt}-{number}") for number in range(10)]

        def promote_one(version: str, before: str | None = before) -> str | None:
            try:
                return move(store, version, before).version
            except ProductionMovedError:
                return None

        with ThreadPoolExecutor(len(candidates)) as pool:
            winners = list(filter(None, pool.map(promote_one, candidates)))
        pointer = registry.read_pointer(store, MODEL)
        assert pointer
        assert winners == [pointer.version]
        assert len(check_history(store)) == attempt + 1
        before = pointer.version


class Dying(Store):
    """A store of which nothing more is heard after a number of writes."""

    def __init__(self, bucket: str, writes: int) -> None:
        super().__init__(bucket)
        self.left = writes

    def put(self, *args: Any, **kwargs: Any) -> str:
        if self.left == 0:
            raise StoreUnreachableError("the connection was cut")
        self.left -= 1
        return super().put(*args, **kwargs)


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("again", ["the same", "another"])
def test_a_promoter_that_dies_leaves_no_fork(
    writes: int, again: str, store: Store, publish: Callable[[Store, str], str]
) -> None:
    move(store, publish(store, "1"), None)
    publish(store, "2")
    publish(store, "3")
    with pytest.raises(StoreUnreachableError):
        move(Dying(store.bucket, writes), "2", "1")
    version = str(1 + writes)  # an event that is there counts, whether or not the pointer has followed
    assert registry.resolve(store, MODEL, "production") == version
    stored = stored_pointer(store, MODEL)
    assert stored
    assert stored.version == "1"  # what a service sees that reads the pointer alone: whole as well
    if again == "the same":
        assert move(store, "2", "1").number == 2
        assert [event.version for event in check_history(store)] == ["1", "2"]
    elif writes == 0:  # it left nothing
        move(store, "3", "1")
        assert [event.version for event in check_history(store)] == ["1", "3"]
    else:  # the next one finds that production has moved
        with pytest.raises(ProductionMovedError):
            move(store, "3", "1")
        assert [event.version for event in check_history(store)] == ["1", "2"]


def test_an_event_without_its_move_is_finished_by_the_next_promoter(
    store: Store, publish: Callable[[Store, str], str]
) -> None:
    first = move(store, publish(store, "1"), None)
    publish(store, "2")
    event = Event(2, first.time, "somebody who died", "better", "1", "2")
    store.put_json(registry.event_key(MODEL, 2), vars(event))
    with pytest.raises(ProductionMovedError, match="production of m is 2, not 1"):
        move(store, publish(store, "3"), "1")
    assert check_history(store)[-1] == event
    assert move(store, "3", "2").number == 3
    assert [event.version for event in check_history(store)] == ["1", "2", "3"]


def test_a_pointer_that_was_lost_comes_back_where_the_history_ends(
    store: Store, publish: Callable[[Store, str], str]
) -> None:
    for version, before in (("1", None), ("2", "1"), ("3", "2")):
        move(store, publish(store, version), before)
    first = {"version": "1", "event": 1, "since": "a backup"}
    for lose in (
        lambda: store._client.delete_object(Bucket=store.bucket, Key=registry.pointer_key(MODEL)),
        lambda: store.put_json(registry.pointer_key(MODEL), first),
    ):
        lose()
        assert registry.resolve(store, MODEL, "production") == "3"
        for expected in ("1", None):
            with pytest.raises(ProductionMovedError, match="production of m is 3"):
                move(store, "2", expected)
        stored = stored_pointer(store, MODEL)
        assert stored
        assert stored.version == "3"
        assert [event.version for event in check_history(store)] == ["1", "2", "3"]


def test_production_is_no_version_to_move_to(store: Store, publish: Callable[[Store, str], str]) -> None:
    with pytest.raises(DataError, match="no version of 'm' has been promoted yet"):
        move(store, "production", None)
    first = move(store, publish(store, "1"), None)
    assert move(store, "production", "1") == first
    assert len(check_history(store)) == 1


def test_the_pointer_never_names_what_is_not_there(store: Store) -> None:
    store.put("models/m/versions/torn/config.json", b"{}")
    for version in ("torn", "never"):
        with pytest.raises(DataError, match=f"m has no version '{version}'"):
            move(store, version, None)
    assert registry.versions(store, MODEL) == []
    assert registry.read_pointer(store, MODEL) is None


@pytest.mark.parametrize("name", ["../../other", "", ".hidden", "a/b"])
def test_a_name_that_is_no_version_is_refused(name: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the name of a version"):
        registry.pull(store, MODEL, name, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": "1"}', b'{"version": "../x", "event": 1}'])
def test_a_damaged_pointer_is_refused_and_stays_as_it_is(
    content: bytes, store: Store, publish: Callable[[Store, str], str]
) -> None:
    publish(store, "1")
    store.put("models/m/production.json", content)
    with pytest.raises(DataError):
        registry.read_pointer(store, MODEL)
    with pytest.raises(DataError):
        move(store, "1", None)
    assert store.get("models/m/production.json") == content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["version", "event"]), inner),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON | st.fixed_dictionaries({"version": JSON, "event": JSON}))
def test_whatever_is_in_the_pointers_place_is_a_pointer_or_refused(bucket: Store, content: Any) -> None:
    bucket.put(registry.pointer_key("any"), json.dumps(content).encode())
    try:
        pointer = registry.read_pointer(bucket, "any")
    except DataError:
        return
    assert pointer
    assert "/" not in registry.version_prefix("any", pointer.version).removeprefix("models/any/versions/")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"number": 1}'])
def test_a_damaged_event_is_refused(content: bytes, store: Store, publish: Callable[[Store, str], str]) -> None:
    move(store, publish(store, "1"), None)
    store.put(registry.event_key(MODEL, 1), content)
    for read in (
        lambda: registry.history(store, MODEL),
        lambda: registry.read_event(store, MODEL, 1),
        lambda: registry.champion_of(store, MODEL, "run"),
    ):
        with pytest.raises(DataError, match=r"history/00000001\.json is"):
            read()


def test_a_service_pulls_production_or_a_version(
    store: Store, publish: Callable[[Store, str], str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no version of 'm' has been promoted yet"):
        registry.pull(store, MODEL, "production", tmp_path / "model")
    move(store, publish(store, "1"), None)
    move(store, publish(store, "2"), "1")
    assert registry.pull(store, MODEL, "production", tmp_path / "model") == "2"
    assert (tmp_path / "model" / "config.json").read_text() == "2"
    assert registry.pull(store, MODEL, "1", tmp_path / "model") == "1"
    assert (tmp_path / "model" / "config.json").read_text() == "1"


def test_a_service_never_receives_a_damaged_version(
    store: Store, publish: Callable[[Store, str], str], tmp_path: Path
) -> None:
    move(store, publish(store, "1"), None)
    move(store, publish(store, "2"), "1")
    registry.pull(store, MODEL, "1", tmp_path / "model")
    for damage, message in {
        lambda key: store.put(key, b"3"): "is not the file that its manifest names",
        lambda key: store._client.delete_object(Bucket=store.bucket, Key=key): "does not exist, though its manifest",
    }.items():
        damage(f"models/m/files/{hashlib.sha256(b'2').hexdigest()}")
        with pytest.raises(DataError, match=message):
            registry.pull(store, MODEL, "production", tmp_path / "model")
        assert (tmp_path / "model" / "config.json").read_text() == "1"


def test_a_runs_champion_is_what_stood_before_it(store: Store, publish: Callable[[Store, str], str]) -> None:
    assert registry.champion_of(store, MODEL, "first") is None
    move(store, publish(store, "1"), None, who="first")
    assert registry.champion_of(store, MODEL, "first") is None
    assert registry.champion_of(store, MODEL, "second") == "1"
    move(store, publish(store, "2"), "1", who="second")
    assert registry.champion_of(store, MODEL, "second") == "1"
    assert registry.champion_of(store, MODEL, "first") == "2"


# Files that versions share


def test_what_an_earlier_version_has_is_not_uploaded_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[str] = []
    upload = Store.upload
    monkeypatch.setattr(
        Store, "upload", lambda self, *args, **more: uploaded.append(args[1]) or upload(self, *args, **more)
    )
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "frozen").write_bytes(b"f" * 1000)
    for version in ("1", "2"):
        (directory / "trained").write_text(version)
        registry.publish(store, MODEL, version, directory, {})
    assert [key.rpartition("/")[2] for key in uploaded] == [
        hashlib.sha256(content).hexdigest() for content in (b"f" * 1000, b"1", b"2")
    ]
    for version in ("1", "2"):
        registry.pull(store, MODEL, version, tmp_path / version)
        assert (tmp_path / version / "trained").read_text() == version
        assert (tmp_path / version / "frozen").read_bytes() == b"f" * 1000


def test_an_upload_shows_how_far_it_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(20_000_000))
    registry.publish(store, MODEL, "1", tmp_path / "model", {})
    lines = [record.getMessage() for record in caplog.records if record.name == "tasks.progress"]
    assert len(lines) > 1
    assert re.match(r"upload m 1: [\d,]+/20,000,000 bytes \(\d+%\), [\d,]+/s, \d+:\d\d left", lines[0])
    assert lines[-1].startswith("upload m 1: 20,000,000/20,000,000 bytes (100%)")
    caplog.clear()
    registry.publish(store, MODEL, "2", tmp_path / "model", {})  # there is nothing to upload
    assert not [record for record in caplog.records if record.name == "tasks.progress"]


def test_a_shared_file_that_was_lost_is_uploaded_again(store: Store, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "frozen").write_bytes(b"f" * 1000)
    key = f"models/m/files/{hashlib.sha256(b'f' * 1000).hexdigest()}"
    registry.publish(store, MODEL, "1", directory, {})
    for lose in (lambda: store.delete(key), lambda: store.put(key, b"cut short")):
        lose()
        registry.publish(store, MODEL, "1", directory, {})
        assert store.get(key) == b"f" * 1000


def test_a_version_never_changes(store: Store, publish: Callable[[Store, str], str], tmp_path: Path) -> None:
    publish(store, "1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("other")
    with pytest.raises(DataError, match="m has a version '1' with other files, and a version never changes"):
        registry.publish(store, MODEL, "1", tmp_path / "other", {})
    registry.pull(store, MODEL, "1", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "1"


# Aliases, and versions that were withdrawn


def test_aliases_move_apart_from_each_other(store: Store, publish: Callable[[Store, str], str], tmp_path: Path) -> None:
    for version in ("1", "2"):
        publish(store, version)
    move(store, "1", None)
    staged = registry.move(store, MODEL, "2", expected=None, who="w", why="y", alias="staging", gate={"BLEU": 30.5})
    assert registry.read_event(store, MODEL, 2) == staged
    move(store, "2", "1")
    registry.move(store, MODEL, "production", expected="2", who="w", why="y", alias="staging")
    events = registry.history(store, MODEL)
    assert [(event.alias, event.before, event.version) for event in events] == [
        ("production", None, "1"),
        ("staging", None, "2"),
        ("production", "1", "2"),
    ]
    assert registry.aliases(events) == {"production": "2", "staging": "2"}
    assert registry.pull(store, MODEL, "staging", tmp_path / "model") == "2"
    assert registry.predecessor(store, MODEL) == "1"
    for alias in ("../production", "", "a/b"):
        with pytest.raises(DataError, match="is not the name of"):
            registry.move(store, MODEL, "1", expected=None, who="w", why="y", alias=alias)


def test_a_version_that_was_withdrawn_is_never_chosen_again(store: Store, publish: Callable[[Store, str], str]) -> None:
    for version, before in (("1", None), ("2", "1"), ("3", "2")):
        move(store, publish(store, version), before)
    withdrawn = registry.withdraw(store, MODEL, "2", who="a person", why="insults customers")
    assert registry.withdraw(store, MODEL, "2", who="another", why="again") == withdrawn
    for alias, expected in (("production", "3"), ("staging", None)):
        with pytest.raises(DataError, match="m 2 was withdrawn, and is not to be chosen again"):
            registry.move(store, MODEL, "2", expected=expected, who="w", why="y", alias=alias)
    assert registry.predecessor(store, MODEL) == "1"
    assert registry.withdrawn(store, MODEL) == ["2"]
    with pytest.raises(DataError, match="production of m is 3: move production to another version first"):
        registry.withdraw(store, MODEL, "3", who="w", why="y")


@pytest.mark.parametrize("writes", [0, 1])
def test_a_withdrawal_that_died_is_done_by_the_next_writer(
    writes: int, store: Store, publish: Callable[[Store, str], str]
) -> None:
    move(store, publish(store, "1"), None)
    publish(store, "2")
    with pytest.raises(StoreUnreachableError):
        registry.withdraw(Dying(store.bucket, writes), MODEL, "2", who="w", why="y")
    if writes:  # the event is there, so it counts
        with pytest.raises(DataError, match="was withdrawn"):
            move(store, "2", "1")
        assert registry.withdrawn(store, MODEL) == ["2"]
    else:
        move(store, "2", "1")


# The steps that use it


def judged(
    store: Store,
    tmp_path: Path,
    name: str,
    decision: str,
    champion: str | None,
    *,
    model: str = MODEL,
    trained: bytes = b"weights",
) -> Run:
    """A run whose candidate has been judged."""
    run = Run(store, f"runs/{name}")
    candidate = tmp_path / name
    candidate.mkdir()
    (candidate / "config.json").write_text(name)
    (candidate / "trained.bin").write_bytes(trained)
    fingerprint = artifacts.publish(store, run.key("candidate"), candidate).fingerprint
    settings = {
        "name": model,
        "description": "d",
        "data": {"source": "x/y"},
        "base_model": {"source": "x/z"},
        "preprocessing": {"prompt": ""},
    }
    store.put_json(
        run.key("config.json"), {"settings": settings, "created": "2026-11-24T00:00:00+00:00", "code_version": "c"}
    )
    check = {"name": "BLEU", "observed": 1.0, "required": ">= 2", "passed": False, "sentence": "BLEU is too low."}
    results: dict[str, dict[str, Any]] = {
        "pull": {"inputs": "i", "dataset": "d", "base_model": "b"},
        "train": {"candidate": run.key("candidate")},
        "evaluate": {
            "bleu": {"candidate": 2.0, "champion": 1.0},
            "validation_loss": {"candidate": 1.5},
            "champion": champion,
        },
        "gate": {
            "decision": decision,
            "champion_version": champion,
            "candidate_fingerprint": fingerprint,
            "summary": f"{decision}: because",
            "checks": [check] if decision == "reject" else [],
        },
    }
    for step, result in results.items():
        run.save_result(step, {**result, "seconds": 1.0})
    return run


def test_promoting_a_run_again_is_the_same_version(store: Store, tmp_path: Path) -> None:
    run = judged(store, tmp_path, "r1", "promote", None)
    first = promote.run(run)
    assert promote.run(run) == first
    assert len(check_history(store)) == 1
    manifest = registry.manifest(store, MODEL, "production")
    assert manifest.metadata["run"] == "r1"
    assert manifest.metadata["metrics"] == {"candidate": 2.0, "champion": 1.0}
    assert manifest.metadata["lineage"]["inputs"] == "i"


def test_promote_refuses_when_production_has_moved_meanwhile(store: Store, tmp_path: Path) -> None:
    first, late = judged(store, tmp_path, "r1", "promote", None), judged(store, tmp_path, "r2", "promote", None)
    version = promote.run(first)["version"]
    with pytest.raises(ProductionMovedError, match="run the pipeline again"):
        promote.run(late)
    assert [event.version for event in check_history(store)] == [version]


def test_a_run_that_is_promoted_again_after_another_does_not_undo_the_other(store: Store, tmp_path: Path) -> None:
    first = judged(store, tmp_path, "r1", "promote", None)
    one = promote.run(first)["version"]
    second = judged(store, tmp_path, "r2", "promote", one)
    two = promote.run(second)["version"]
    with pytest.raises(ProductionMovedError):
        promote.run(first)
    assert [event.version for event in check_history(store)] == [one, two]


def test_a_run_that_is_promoted_again_does_not_undo_a_rollback(store: Store, tmp_path: Path) -> None:
    before = promote.run(judged(store, tmp_path, "r1", "promote", None))["version"]
    run = judged(store, tmp_path, "r2", "promote", before)
    version = promote.run(run)["version"]
    move(store, before, version, who="a person")
    with pytest.raises(
        ProductionMovedError, match=f"r2 promoted {version} at .*, and production has moved to {before}"
    ):
        promote.run(run)
    assert [event.version for event in check_history(store)] == [before, version, before]


@pytest.mark.parametrize("step", ["gate", "train", "pull", "evaluate"])
def test_promote_without_a_result_says_which_and_moves_nothing(step: str, store: Store, tmp_path: Path) -> None:
    run = judged(store, tmp_path, "r1", "promote", None)
    store._client.delete_object(Bucket=store.bucket, Key=run.key("results", f"{step}.json"))
    with pytest.raises(DataError, match=f"has no result of the {step} step: run it first"):
        promote.run(Run.at(run.uri))
    assert registry.read_pointer(store, MODEL) is None
    assert registry.versions(store, MODEL) == []


def test_a_candidate_that_was_tampered_with_is_not_promoted(store: Store, tmp_path: Path) -> None:
    run = judged(store, tmp_path, "r1", "promote", None)
    store.put(run.key("candidate", "config.json"), b"r2")
    with pytest.raises(DataError, match="is not the file that its manifest names"):
        promote.run(run)
    assert registry.read_pointer(store, MODEL) is None
    assert registry.versions(store, MODEL) == []


def test_a_promotion_that_was_cut_off_is_finished_by_the_next_try(store: Store, tmp_path: Path) -> None:
    run = judged(store, tmp_path, "r1", "promote", None)
    for writes in range(3):  # manifest, event, pointer: files are uploaded another way
        run.store = Dying(store.bucket, writes)
        if writes:
            run.store.left -= 1  # the manifest is there by now
        with pytest.raises(StoreUnreachableError):
            promote.run(run)
        assert registry.read_pointer(store, MODEL) is None
    run.store = store
    version = promote.run(run)["version"]
    assert [event.version for event in check_history(store)] == [version]


def test_reject_leaves_production_where_it_is(store: Store, tmp_path: Path) -> None:
    version = promote.run(judged(store, tmp_path, "r1", "promote", None))["version"]
    result = reject.run(judged(store, tmp_path, "r2", "reject", version))
    assert result["production"] == version
    assert result["summary"].startswith(f"production stays at {version}; 1 checks failed: BLEU is too low.")
    assert len(check_history(store)) == 1


def test_each_outcome_refuses_the_other_decision(store: Store, tmp_path: Path) -> None:
    refused, passed = judged(store, tmp_path, "r1", "reject", None), judged(store, tmp_path, "r2", "promote", None)
    with pytest.raises(DataError, match="decided 'reject': nothing to promote"):
        promote.run(refused)
    with pytest.raises(DataError, match="decided 'promote': nothing to reject"):
        reject.run(passed)
    assert registry.read_pointer(store, MODEL) is None
    result = reject.run(refused)
    assert result["reasons"] == ["BLEU is too low."]
    assert "there is no production model yet" in result["summary"]
