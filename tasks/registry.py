"""Published models, written: versions come, pointers move, versions are withdrawn and expire.

The layout, and all reading, is in `retrain_models.registry`. Every change is one event of one history per model:

1. the event is appended, by a write that succeeds only where there is none of its number;
2. what it says is done: the pointer is replaced, by a write that succeeds only over the pointer that was read.

A crash between the two leaves an event that is not done yet. Readers take it into account, and the next writer does it
before it appends its own, so there is one history and never a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrain_models.registry import (
    CTRANSLATE2,
    PRODUCTION,
    WITHDRAWN,
    Event,
    Pointer,
    aliases,
    chosen,
    event_key,
    files_prefix,
    history,
    manifest,
    pointer_key,
    pull,
    read_event,
    read_pointer,
    resolve,
    safe,
    stored_pointer,
    version_prefix,
    versions,
    withdrawn,
)
from tasks import artifacts
from tasks.artifacts import MANIFEST, Manifest
from tasks.errors import DataError, SettingsError
from tasks.progress import Progress
from tasks.storage import ConflictError, MissingObjectError, Store, in_parallel

__all__ = [
    "CTRANSLATE2",
    "PRODUCTION",
    "Event",
    "Pointer",
    "ProductionMovedError",
    "aliases",
    "champion_of",
    "chosen",
    "diff",
    "event_key",
    "expire",
    "files_prefix",
    "history",
    "manifest",
    "move",
    "pointer_key",
    "predecessor",
    "publish",
    "pull",
    "read_event",
    "read_pointer",
    "resolve",
    "stored_pointer",
    "version_prefix",
    "versions",
    "withdraw",
    "withdrawn",
]


EXPIRED = "expired.json"  # what was the manifest
_proven: set[tuple[str | None, str]] = set()  # stores and buckets that have shown that they can write on a condition


class ProductionMovedError(DataError):
    """Somebody else moved production after the candidate was compared with it."""


def publish(
    store: Store,
    model: str,
    version: str,
    directory: Path,
    metadata: dict[str, Any],
) -> Manifest:
    """Make a version of a directory. Files that another version has already are not uploaded again.

    Safe to repeat: what is there stays, what an interrupted call has left out is added. Raises `DataError` when the
    version exists with other files, since a version never changes, and when it has expired.
    """
    made = Manifest(artifacts.describe(directory).files, metadata)
    if not made.files:
        raise DataError(f"{directory} has no files: there is nothing to publish")
    place = version_prefix(model, safe(version))
    if store.exists(f"{place}/{EXPIRED}"):
        raise DataError(f"{model} had a version {version!r}, which has expired and cannot come back: train again")
    # A file that no version names may be about to be deleted by `expire`: it is uploaded again.
    manifests = in_parallel(lambda name: manifest(store, model, name), versions(store, model))
    kept = {file.sha256 for each in manifests for file in each.files}
    missing = {}
    for file in made.files:
        shared = f"{files_prefix(model)}/{file.sha256}"
        found = store.find(shared) if file.sha256 in kept else None
        if found is None or found.size != file.size:
            missing[shared] = directory / file.path
    size = sum(path.stat().st_size for path in missing.values())
    with Progress(f"upload {model} {version}", size, "bytes") as progress:
        store.upload_all(missing, advance=progress.advance)
    with contextlib.suppress(ConflictError):
        store.put_json(f"{place}/{MANIFEST}", made.to_dict(), if_absent=True)
    there = manifest(store, model, version)
    if there.fingerprint != made.fingerprint:
        raise DataError(f"{model} has a version {version!r} with other files, and a version never changes")
    return there


def champion_of(store: Store, model: str, run_id: str) -> str | None:
    """The version that a run has to beat, or None where nothing has been promoted.

    That is production; but where the run itself put it there, and is looked at again, what stood there before.
    """
    pointer = read_pointer(store, model)
    if pointer is None:
        return None
    event = read_event(store, model, pointer.event)
    return event.before if event.who == run_id else pointer.version


def predecessor(store: Store, model: str, alias: str = PRODUCTION) -> str:
    """The version that an alias stood for before, and that can be chosen again: what a rollback goes back to.

    Raises `DataError` when there is none.
    """
    events = history(store, model)
    current, unfit = aliases(events).get(alias), set(withdrawn(store, model))
    fit = set(versions(store, model)) - unfit
    for event in reversed(events):
        if event.alias == alias and event.before in fit and event.before != current:
            return event.before
    raise DataError(f"{alias} of {model} has no earlier version to go back to: name one (models list {model})")


def move(
    store: Store,
    model: str,
    version: str,
    *,
    expected: str | None,
    who: str,
    why: str,
    alias: str = PRODUCTION,
    gate: dict[str, Any] | None = None,
) -> Event:
    """Point an alias at a version, if it still points at `expected` (None: at nothing).

    Moving to where it already points changes nothing. `gate` is for the history. Raises `ProductionMovedError` when the
    alias is elsewhere, `DataError` for a version that does not exist or was withdrawn.
    """
    version = safe(resolve(store, model, version))

    def decide(number: int) -> Event:
        pointer = read_pointer(store, model, alias)
        current = pointer.version if pointer else None
        manifest(store, model, version)  # a pointer never names what is not there
        if pointer and current == version:
            return read_event(store, model, pointer.event)
        if current != expected:
            raise ProductionMovedError(
                f"{alias} of {model} is {current}, not {expected} with which the candidate was compared: "
                f"run the pipeline again"
            )
        if store.exists(f"{version_prefix(model, version)}/{WITHDRAWN}"):
            raise DataError(f"{model} {version} was withdrawn, and is not to be chosen again")
        return Event(number, _now(), who, why, current, version, alias, "move", gate)

    return _append(store, model, decide)


def withdraw(store: Store, model: str, version: str, *, who: str, why: str) -> Event:
    """Never choose this version again. Raises `DataError` while an alias stands for it, and when it does not exist."""
    return _retire(store, model, version, "withdraw", who=who, why=why)


def expire(store: Store, model: str, version: str, *, who: str, why: str) -> Event:
    """Let a version cease to exist, for ever. Its files stay for a day, for those who are pulling it.

    Raises `DataError` while an alias stands for it, and when it does not exist.
    """
    return _retire(store, model, version, "expire", who=who, why=why)


def _retire(store: Store, model: str, version: str, action: str, *, who: str, why: str) -> Event:
    def decide(number: int) -> Event:
        manifest(store, model, safe(version))
        events = history(store, model)
        for alias, pointed_at in aliases(events).items():
            if pointed_at == version:
                raise DataError(f"{alias} of {model} is {version}: move {alias} to another version first")
        for event in events:
            if action == "withdraw" and (event.action, event.version) == (action, version):
                return event
        return Event(number, _now(), who, why, None, version, None, action)

    return _append(store, model, decide)


def _append(store: Store, model: str, decide: Callable[[int], Event]) -> Event:
    """Append the event that `decide` makes, of the number that it is given, and do what it says.

    `decide` may return an event that is there already, or raise. It is asked again when another writer was first.
    """
    require_conditional_writes(store, model)
    mine: Event | None = None
    while True:
        last = _last_event(store, model)
        if last:
            _finish(store, model, last)
        # The answer to a write does not tell whether it was done: it may have been lost, and the write repeated.
        if mine and last and last.number >= mine.number and read_event(store, model, mine.number) == mine:
            return mine
        number = last.number + 1 if last else 1
        event = decide(number)
        if event.number < number:
            _finish(store, model, event)
            return event
        with contextlib.suppress(ConflictError):
            store.put_json(event_key(model, number), asdict(event), if_absent=True)
        mine = event


def _last_event(store: Store, model: str) -> Event | None:
    last = None
    for entry in store.list(f"models/{model}/history/"):
        last = entry
    return read_event(store, model, int(Path(last.key).stem)) if last else None


def _finish(store: Store, model: str, event: Event) -> None:
    """Do what an event says, unless that was done already."""
    place = version_prefix(model, event.version)
    if event.action == "withdraw":
        with contextlib.suppress(ConflictError):
            store.put_json(f"{place}/{WITHDRAWN}", asdict(event), if_absent=True)
    elif event.action == "expire":
        _remove_manifest(store, place)
    elif event.alias:
        while True:
            pointer = stored_pointer(store, model, event.alias)
            if pointer and pointer.event >= event.number:
                return
            content = {"version": event.version, "event": event.number, "since": event.time}
            condition: dict[str, Any] = {"if_match": pointer.etag} if pointer else {"if_absent": True}
            with contextlib.suppress(ConflictError):  # somebody else did it, or it was done and the answer lost
                store.put_json(pointer_key(model, event.alias), content, **condition)


def _remove_manifest(store: Store, place: str) -> None:
    with contextlib.suppress(MissingObjectError):  # where it is gone already
        content = store.get(f"{place}/{MANIFEST}")
        store.put(f"{place}/{EXPIRED}", content)
        store.delete(f"{place}/{MANIFEST}")


def diff(old: Manifest, new: Manifest) -> list[str]:
    """What differs between two versions, a line each: files, and whatever else their manifests say."""

    def flat(value: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {name: value}
        pairs = [flat(inner, f"{name}.{key}".lstrip(".")) for key, inner in value.items()]
        return {key: inner for pair in pairs for key, inner in pair.items()}

    before, after = ({file.path: file for file in each.files} for each in (old, new))
    same = [path for path in after if path in before and before[path].sha256 == after[path].sha256]
    lines = [f"equal files: {len(same)}, {sum(after[path].size for path in same):,} bytes"]
    for path in sorted({*before, *after} - set(same)):
        sizes = [f"{files[path].size:,} bytes" if path in files else "absent" for files in (before, after)]
        lines.append(f"file {path}: {sizes[0]} -> {sizes[1]}")
    said = [flat(each.metadata) for each in (old, new)]
    for name in sorted({*said[0], *said[1]}):
        values = [json.dumps(each[name], ensure_ascii=False) if name in each else "absent" for each in said]
        if values[0] != values[1]:
            lines.append(f"{name}: {values[0]} -> {values[1]}")
    return lines


def require_conditional_writes(store: Store, model: str) -> None:
    """Raise `SettingsError` for a store that writes whatever the condition, where nothing else keeps order."""
    if os.environ.get("RETRAIN_STORE_LOCK") or (store.endpoint, store.bucket) in _proven:
        return
    key, about = f"models/{model}/probe.json", b'{"about": "shows whether this store can write on a condition"}'
    with contextlib.suppress(ConflictError):
        store.put(key, about, if_absent=True)
    for condition in ({"if_absent": True}, {"if_match": '"00000000000000000000000000000000"'}):
        try:
            store.put(key, about, **condition)
        except ConflictError:
            continue
        raise SettingsError(
            f"the object store at {store.endpoint or 'AWS'} writes whatever the condition ({', '.join(condition)}): "
            f"two promotions at once would overwrite each other. Use another store, or set RETRAIN_STORE_LOCK to a "
            f"file that every writer can lock"
        )
    _proven.add((store.endpoint, store.bucket))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
