"""What a service asks of the registry: the model, and news of it."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrain_models import registry
from retrain_models.artifacts import Manifest
from retrain_models.errors import MissingObjectError, RetryableError
from retrain_models.registry import PRODUCTION
from retrain_models.storage import Bucket

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pulled:
    """A model on this machine: its version, where it is, and what its manifest says of it."""

    version: str
    directory: Path
    manifest: Manifest


def pull(
    name: str,
    version: str,
    directory: str | os.PathLike[str],
    *,
    int8: bool = False,
    bucket: str | None = None,
    reuse: Sequence[str | os.PathLike[str]] = (),
) -> Pulled:
    """Download a model: `version` is an alias (`production`) or a version, `directory` what shall hold its files.

    Every file is checked against the manifest before the directory appears under its name, all at once. What an
    interrupted call has downloaded is used by the next. A model that is there already gives way when everything is
    there, becomes `DIRECTORY.previous`, and lends the files that have not changed; so do the directories in `reuse`.
    Files are lent by hard links, so nobody may write to them.

    With `int8`, a version that carries a copy for CTranslate2 comes with that, in `DIRECTORY/ctranslate2`, in place of
    its full-precision weights; one that carries none comes with these.

    Raises `DataError` for what does not exist or is not what was published, `RetryableError` for what may work later,
    `SettingsError` for a wrong address, key or permission. Nothing is changed then.
    """
    store, target = Bucket(bucket or default_bucket()), Path(directory)
    found = registry.resolve(store, name, version)
    manifest = registry.manifest(store, name, found)
    previous = target.with_name(f"{target.name}.previous")
    lenders = [target, previous, *map(Path, reuse)]
    registry.pull(store, name, found, target, int8=int8, reuse=lenders, keep_previous=True)
    return Pulled(found, target, manifest)


def watch(name: str, alias: str = PRODUCTION, *, bucket: str | None = None, seconds: float = 30) -> Iterator[str]:
    """The version that an alias stands for: now, and then each time that it moves, for ever.

    It asks for the pointer about every so many seconds, with its ETag: as long as nothing has changed, nothing is
    transferred. An alias that was never set is waited for, and so is a store that does not answer (a warning says so).
    """
    store, key = Bucket(bucket or default_bucket()), registry.pointer_key(name, registry.safe(alias))
    etag, version = None, None
    while True:
        try:
            found = store.get_if_changed(key, etag)
            if found:
                etag = found[1]
                moved_to = registry.parse_pointer(key, *found).version
                if moved_to != version:
                    version = moved_to
                    yield version
        except MissingObjectError:
            log.info("%s has no %s yet", name, alias)
        except RetryableError as error:
            log.warning("%s is not known to be up to date: %s", name, error)
        time.sleep(seconds * random.uniform(0.8, 1.2))  # noqa: S311  (so that many services do not ask at once)


def default_bucket() -> str:
    """The bucket that `RETRAIN_BUCKET` names."""
    return os.environ.get("RETRAIN_BUCKET") or "retrain"
