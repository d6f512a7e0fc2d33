"""Published models, read: immutable versions, the pointers to them, and the history of how they moved.

    models/NAME/files/SHA256                    the versions' files, each once, under its SHA-256
    models/NAME/versions/VERSION/manifest.json  paths, sizes, SHA-256, metrics, lineage; written last
    models/NAME/versions/VERSION/withdrawn.json this version is never to be chosen again, and why
    models/NAME/ALIAS.json                      a pointer (production, staging, ...): its version, and the event that
                                                put it there
    models/NAME/history/00000042.json           what was done, when, by whom, why: append-only

The history decides. An event is appended first, by a write that succeeds only where there is none of that number; then
the pointer follows. Whoever reads a pointer also looks for events after the one that it names, so a crash between the
two is seen by nobody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain_models import artifacts
from retrain_models.artifacts import File, Manifest
from retrain_models.errors import DataError, MissingObjectError
from retrain_models.storage import Bucket, in_parallel

PRODUCTION = "production"
CTRANSLATE2 = "ctranslate2"  # the folder of the copy in int8, in a version that carries one
WITHDRAWN = "withdrawn.json"


@dataclass(frozen=True)
class Event:
    """One entry of the history; `number` counts from 1.

    `action` is `move` (the alias pointed at `before`, or at nothing where that is None, and now at `version`) or
    `withdraw` (`version` is never to be chosen again; no alias is meant). `gate` is what the gate found, where a run
    promoted.
    """

    number: int
    time: str
    who: str
    why: str
    before: str | None
    version: str
    alias: str | None = PRODUCTION
    action: str = "move"
    gate: dict[str, Any] | None = None


@dataclass(frozen=True)
class Pointer:
    """Which version an alias stands for, since which event; `etag` is what a conditional write needs."""

    version: str
    event: int
    etag: str


def version_prefix(model: str, version: str) -> str:
    """Where a version's manifest is."""
    return f"models/{model}/versions/{version}"


def files_prefix(model: str) -> str:
    """Where the files of all its versions are."""
    return f"models/{model}/files"


def pointer_key(model: str, alias: str = PRODUCTION) -> str:
    """Where a pointer is."""
    return f"models/{model}/{alias}.json"


def event_key(model: str, number: int) -> str:
    """Where an event is."""
    return f"models/{model}/history/{number:08}.json"


def stored_pointer(store: Bucket, model: str, alias: str = PRODUCTION) -> Pointer | None:
    """The pointer as it is written, or None where there is none. Raises `DataError` when it is damaged."""
    key = pointer_key(model, safe(alias))
    try:
        content, etag = store.get_tagged(key)
    except MissingObjectError:
        return None
    return parse_pointer(key, content, etag)


def parse_pointer(key: str, content: bytes, etag: str) -> Pointer:
    """A pointer's content, checked. Raises `DataError` when it is damaged."""
    try:
        fields = json.loads(content)
        return Pointer(safe(fields["version"]), int(fields["event"]), etag)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{key} is damaged ({error!r}); restore it from the newest event") from error


def read_pointer(store: Bucket, model: str, alias: str = PRODUCTION) -> Pointer | None:
    """What an alias stands for, or None where it was never set: the pointer, or an event after it if there is one.

    Raises `DataError` when the pointer or such an event is damaged.
    """
    pointer = stored_pointer(store, model, alias)
    for event in reversed(events_after(store, model, pointer.event if pointer else 0)):
        if event.action == "move" and event.alias == alias:
            return Pointer(event.version, event.number, pointer.etag if pointer else "")
    return pointer


def versions(store: Bucket, model: str) -> list[str]:
    """Every complete version, oldest first: a version without a manifest does not exist."""
    return _named(store, model, artifacts.MANIFEST)


def withdrawn(store: Bucket, model: str) -> list[str]:
    """The versions that were withdrawn."""
    return _named(store, model, WITHDRAWN)


def _named(store: Bucket, model: str, name: str) -> list[str]:
    found = re.compile(rf"models/{re.escape(model)}/versions/([^/]+)/{re.escape(name)}")
    matches = (found.fullmatch(entry.key) for entry in store.list(f"models/{model}/versions/"))
    return [match[1] for match in matches if match]


def resolve(store: Bucket, model: str, version: str) -> str:
    """A version's name: what an alias (`production`, `staging`) stands for, or else the name itself.

    Raises `DataError` when nothing has been promoted, and for what cannot be a name.
    """
    pointer = stored_pointer(store, model, version)
    if pointer or version == PRODUCTION:
        pointer = read_pointer(store, model, version)
        if pointer is None:
            raise DataError(f"no version of {model!r} has been promoted yet")
        return pointer.version
    return version


def manifest(store: Bucket, model: str, version: str) -> Manifest:
    """A version's manifest. Raises `DataError` for a version that does not exist."""
    version = resolve(store, model, version)
    try:
        return artifacts.read_manifest(store, version_prefix(model, version))
    except MissingObjectError as error:
        raise DataError(f"{model} has no version {version!r}") from error


def pull(
    store: Bucket,
    model: str,
    version: str,
    directory: Path,
    *,
    int8: bool = False,
    reuse: Sequence[Path] = (),
    keep_previous: bool = False,
    advance: Callable[[int], Any] = lambda count: None,
) -> str:
    """Download a version, every file verified before `directory` appears; returns the version's name.

    The copy in int8 stays in the store; with `int8` it comes in place of the weights, if there is one. The other
    arguments are those of `artifacts.fetch`.
    """
    version = resolve(store, model, version)
    files = {file.path for file in chosen(manifest(store, model, version), int8=int8)}
    try:
        artifacts.fetch(
            store,
            version_prefix(model, version),
            directory,
            wanted=files.__contains__,
            shared=files_prefix(model),
            reuse=reuse,
            keep_previous=keep_previous,
            advance=advance,
        )
    except MissingObjectError as error:
        raise DataError(f"{model} has no version {version!r}") from error
    return version


def chosen(version: Manifest, *, int8: bool = False) -> list[File]:
    """The files of a version that a pull downloads: all but the copy in int8, or that in place of the weights."""
    copy = f"{CTRANSLATE2}/"
    if int8 and any(file.path.startswith(copy) for file in version.files):
        return [file for file in version.files if not file.path.endswith(".safetensors")]
    return [file for file in version.files if not file.path.startswith(copy)]


def read_event(store: Bucket, model: str, number: int) -> Event:
    """One event of the history. Raises `DataError` when it is damaged."""
    return _event(store, event_key(model, number))


def history(store: Bucket, model: str) -> list[Event]:
    """Every event, oldest first."""
    return events_after(store, model, 0)


def events_after(store: Bucket, model: str, number: int) -> list[Event]:
    """The events that came after one, oldest first."""
    entries = store.list(f"models/{model}/history/", after=event_key(model, number))
    return in_parallel(lambda entry: _event(store, entry.key), list(entries))


def aliases(events: list[Event]) -> dict[str, str]:
    """What every alias stands for at the end of a history."""
    return {event.alias: event.version for event in events if event.action == "move" and event.alias}


def safe(name: Any) -> str:
    """A name of a version or an alias, checked: it becomes part of a key. Raises `DataError`."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise DataError(f"{name!r} is not the name of a version")
    return name


def _event(store: Bucket, key: str) -> Event:
    try:
        return Event(**store.get_json(key))
    except TypeError as error:
        raise DataError(f"{key} is not an event of the history ({error})") from error
