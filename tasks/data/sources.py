"""Datasets and base models from where they live: the hub, a local directory, or a mirror in the object store.

All three end as a local directory in the hub's layout, so what follows has one path. `mirror` copies a source into the
store once, for clusters that cannot reach the hub:

    python -m tasks mirror google/flan-t5-base --revision 7bcac57 --kind model --to s3://retrain/mirrors/flan-t5-base
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from requests import RequestException

from tasks import artifacts
from tasks.errors import DataError, RetryableError, SettingsError
from tasks.storage import MissingObjectError, split_uri

log = logging.getLogger(__name__)

Kind = Literal["dataset", "model"]

# Never a pickle: weights come as safetensors or not at all.
FILES: dict[Kind, tuple[str, ...]] = {
    "dataset": ("*.parquet", "README.md"),
    "model": ("*.safetensors", "*.json", "spiece.model", "README.md"),
}


@dataclass(frozen=True)
class Source:
    """A source that has been brought here: where it is now, and the hub's commit where there is one."""

    directory: Path
    revision: str | None


def bring(source: str, revision: str | None, kind: Kind, scratch: Path) -> Source:
    """Bring a dataset's or a model's files into a directory below `scratch`, or use the local directory they are in.

    Raises `SettingsError` for a source that does not exist, `RetryableError` when the hub does not answer.
    """
    if source.startswith("s3://"):
        store, key = split_uri(source)
        try:
            manifest = artifacts.fetch(store, key, scratch / kind)
        except MissingObjectError as error:
            raise SettingsError(f"{source} is not a mirror: {error}; make one with `python -m tasks mirror`") from error
        mirrored = manifest.metadata.get("revision")
        if revision and not str(mirrored or "").startswith(revision):
            raise SettingsError(
                f"{source} is a mirror of {mirrored or 'no revision'}, not of {revision!r}: change the revision"
            )
        return Source(scratch / kind, mirrored)
    if source and Path(source).is_dir():
        if revision:
            raise SettingsError(
                f"{source} is a local directory, which has no revision {revision!r}: remove the revision"
            )
        return Source(Path(source), None)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source, re.ASCII):
        raise SettingsError(f"{source!r} is no existing directory, no s3:// mirror and no hub name (owner/name)")
    try:
        snapshot = Path(snapshot_download(source, repo_type=kind, revision=revision, allow_patterns=list(FILES[kind])))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise SettingsError(f"the hub has no {kind} {source!r} at revision {revision or 'main'!r}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, RequestException, OSError) as error:
        raise RetryableError(
            f"{source!r} is no directory here, and the hub did not answer ({type(error).__name__}): check the network, "
            f"or set the source to a local directory or an s3:// mirror"
        ) from error
    return Source(snapshot, snapshot.name)  # a snapshot's folder is named by its commit


def copy_files(directory: Path, kind: Kind, target: Path) -> None:
    """Copy what belongs to a dataset or model, links followed, leaving everything else behind."""
    for pattern in FILES[kind]:
        for path in sorted(directory.rglob(pattern)):
            if path.is_dir():  # a folder of parts may be called train.parquet
                continue
            copy = target / path.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if kind == "model" and not any(target.glob("*.safetensors")):
        raise DataError(f"{directory} has no *.safetensors: a base model's weights are read from safetensors only")
    if kind == "dataset" and not any(target.rglob("*.parquet")):
        raise DataError(f"{directory} has no *.parquet: expected a dataset in the hub's layout")


def mirror(source: str, revision: str | None, kind: Kind, target_uri: str) -> artifacts.Manifest:
    """Copy a dataset or a base model into the object store, as an artifact that `bring` reads."""
    store, key = split_uri(target_uri)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        brought = bring(source, revision, kind, scratch)
        copy_files(brought.directory, kind, scratch / "files")
        log.info("mirror: %s at %s -> %s", source, brought.revision or "no revision", target_uri)
        return artifacts.publish(store, key, scratch / "files", {"source": source, "revision": brought.revision})
