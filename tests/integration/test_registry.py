"""Versions, the pointer to production and its history, on real servers, with many writers and with crashes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks import artifacts, promote, registry, reject
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
        artifacts.publish(store, registry.version_prefix(MODEL, version), directory, {"version": version})
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
    pointer = registry.read_pointer(store, MODEL)
    assert pointer
    assert pointer.version == "1"  # readers see the old one, whole
    if again == "the same":
        assert move(store, "2", "1").number == 2
        assert [event.version for event in check_history(store)] == ["1", "2"]
    elif writes == 0:  # it left nothing
        move(store, "3", "1")
        assert [event.version for event in check_history(store)] == ["1", "3"]
    else:  # its event counts, so the next one finds that production has moved
        with pytest.raises(ProductionMovedError):
            move(store, "3", "1")
        assert [event.version for event in check_history(store)] == ["1", "2"]


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
def test_a_damaged_pointer_is_refused(content: bytes, store: Store) -> None:
    store.put("models/m/production.json", content)
    with pytest.raises(DataError):
        registry.read_pointer(store, MODEL)


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


def test_a_runs_champion_is_what_stood_before_it(store: Store, publish: Callable[[Store, str], str]) -> None:
    assert registry.champion_of(store, MODEL, "first") is None
    move(store, publish(store, "1"), None, who="first")
    assert registry.champion_of(store, MODEL, "first") is None
    assert registry.champion_of(store, MODEL, "second") == "1"
    move(store, publish(store, "2"), "1", who="second")
    assert registry.champion_of(store, MODEL, "second") == "1"
    assert registry.champion_of(store, MODEL, "first") == "2"


# The steps that use it


def judged(store: Store, tmp_path: Path, name: str, decision: str, champion: str | None) -> Run:
    """A run whose candidate has been judged."""
    run = Run.at(f"s3://{store.bucket}/runs/{name}")
    candidate = tmp_path / name
    candidate.mkdir()
    (candidate / "config.json").write_text(name)
    artifacts.publish(store, run.key("candidate"), candidate)
    settings = {
        "name": MODEL,
        "description": "d",
        "data": {"source": "x/y"},
        "base_model": {"source": "x/z"},
        "preprocessing": {"prompt": ""},
    }
    store.put_json(
        run.key("config.json"), {"settings": settings, "created": "2026-11-24T00:00:00+00:00", "code_version": "c"}
    )
    check = {"name": "BLEU", "observed": 1.0, "required": ">= 2", "passed": False, "sentence": "BLEU is too low."}
    for step, result in {
        "pull": {"inputs": "i", "dataset": "d", "base_model": "b"},
        "train": {"candidate": run.key("candidate")},
        "evaluate": {"bleu": {"candidate": 2.0, "champion": 1.0}, "champion": champion},
        "gate": {
            "decision": decision,
            "champion_version": champion,
            "summary": f"{decision}: because",
            "checks": [check] if decision == "reject" else [],
        },
    }.items():
        run.save_result(step, result)
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
