"""Published models: immutable versions, the pointer to production, and the history of how it moved.

    models/NAME/versions/VERSION/...            a from_pretrained directory
    models/NAME/versions/VERSION/manifest.json  files, sizes, SHA-256, metrics, lineage; written last
    models/NAME/production.json                 the pointer: the version in production and the event that put it there
    models/NAME/history/00000042.json           what moved the pointer, when, why, from, to: append-only

The event is appended first, by a write that succeeds only where there is none of that number; then the pointer moves,
by a write that succeeds only over the pointer that was read. A crash between the two leaves an event that the pointer
does not name yet: the next writer finishes that move before its own, so there is one history and never a fork.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks import artifacts
from tasks.artifacts import Manifest
from tasks.errors import DataError
from tasks.storage import ConflictError, MissingObjectError, Store

PRODUCTION = "production"


@dataclass(frozen=True)
class Event:
    """One movement of the pointer. `number` counts from 1; `before` is None for the first version ever."""

    number: int
    time: str
    who: str
    why: str
    before: str | None
    version: str


@dataclass(frozen=True)
class Pointer:
    """Which version is in production, since which event; `etag` is what a conditional write needs."""

    version: str
    event: int
    etag: str


class ProductionMovedError(DataError):
    """Somebody else moved production after the candidate was compared with it."""


def version_prefix(model: str, version: str) -> str:
    """Where a version's files are."""
    return f"models/{model}/versions/{version}"


def pointer_key(model: str) -> str:
    """Where the pointer is."""
    return f"models/{model}/{PRODUCTION}.json"


def event_key(model: str, number: int) -> str:
    """Where an event is."""
    return f"models/{model}/history/{number:08}.json"


def read_pointer(store: Store, model: str) -> Pointer | None:
    """The pointer to production, or None where nothing has been promoted. Raises `DataError` when it is damaged."""
    try:
        content, etag = store.get_tagged(pointer_key(model))
    except MissingObjectError:
        return None
    try:
        fields = json.loads(content)
        return Pointer(_safe(fields["version"]), int(fields["event"]), etag)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{pointer_key(model)} is damaged ({error!r}); restore it from the newest event") from error


def versions(store: Store, model: str) -> list[str]:
    """Every complete version, oldest first: a version without a manifest does not exist."""
    found = re.compile(rf"models/{re.escape(model)}/versions/([^/]+)/{re.escape(artifacts.MANIFEST)}")
    matches = (found.fullmatch(entry.key) for entry in store.list(f"models/{model}/versions/"))
    return [match[1] for match in matches if match]


def resolve(store: Store, model: str, version: str) -> str:
    """A version's name; `production` stands for the one the pointer names. Raises `DataError` when there is none."""
    if version != PRODUCTION:
        return _safe(version)
    pointer = read_pointer(store, model)
    if pointer is None:
        raise DataError(f"no version of {model!r} has been promoted yet")
    return pointer.version


def manifest(store: Store, model: str, version: str) -> Manifest:
    """A version's manifest. Raises `DataError` for a version that does not exist."""
    version = resolve(store, model, version)
    try:
        return artifacts.read_manifest(store, version_prefix(model, version))
    except MissingObjectError as error:
        raise DataError(f"{model} has no version {version!r}") from error


def read_event(store: Store, model: str, number: int) -> Event:
    """One event of the history. Raises `DataError` when it is damaged."""
    return _event(store, event_key(model, number))


def champion_of(store: Store, model: str, run_id: str) -> str | None:
    """The version that a run has to beat, or None where nothing has been promoted.

    That is production; but where the run itself put it there, and is looked at again, what stood there before.
    """
    pointer = read_pointer(store, model)
    if pointer is None:
        return None
    event = read_event(store, model, pointer.event)
    return event.before if event.who == run_id else pointer.version


def pull(store: Store, model: str, version: str, directory: Path) -> str:
    """Download a version, every file verified before `directory` appears; returns the version's name."""
    version = resolve(store, model, version)
    try:
        artifacts.fetch(store, version_prefix(model, version), directory)
    except MissingObjectError as error:
        raise DataError(f"{model} has no version {version!r}") from error
    return version


def history(store: Store, model: str) -> list[Event]:
    """Every event, oldest first."""
    return [_event(store, entry.key) for entry in store.list(f"models/{model}/history/")]


def move(store: Store, model: str, version: str, *, expected: str | None, who: str, why: str) -> Event:
    """Point production at a version, if it still points at `expected` (None: at nothing).

    Moving to where it already points changes nothing. Raises `ProductionMovedError` when production is elsewhere.
    """
    version = resolve(store, model, version)
    manifest(store, model, version)  # the pointer never names what is not there
    mine: Event | None = None
    while True:
        pointer = read_pointer(store, model)
        current = pointer.version if pointer else None
        if pointer and mine and pointer.event >= mine.number:
            return mine
        if pointer and current == version:
            return read_event(store, model, pointer.event)
        if current != expected:
            raise ProductionMovedError(
                f"production of {model} is {current}, not {expected} with which the candidate was compared: "
                f"run the pipeline again"
            )
        number = pointer.event + 1 if pointer else 1
        event = Event(number, datetime.now(UTC).isoformat(timespec="seconds"), who, why, current, version)
        try:
            store.put_json(event_key(model, number), asdict(event), if_absent=True)
            mine = event
        except ConflictError:  # another writer's event, perhaps of one that died here: its move comes first
            event = history(store, model)[-1]  # more than one ahead where the pointer was lost or restored
        with contextlib.suppress(ConflictError):  # lost: another writer finished this same event
            _write_pointer(store, model, event, pointer)


def _event(store: Store, key: str) -> Event:
    try:
        return Event(**store.get_json(key))
    except TypeError as error:
        raise DataError(f"{key} is not an event of the history ({error})") from error


def _write_pointer(store: Store, model: str, event: Event, over: Pointer | None) -> None:
    content = {"version": event.version, "event": event.number, "since": event.time}
    condition: dict[str, Any] = {"if_match": over.etag} if over else {"if_absent": True}
    store.put_json(pointer_key(model), content, **condition)


def _safe(version: Any) -> str:
    if not isinstance(version, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", version):
        raise DataError(f"{version!r} is not the name of a version")
    return version
