"""Directories in the object store that are whole or do not exist: how one is written.

Datasets, prepared data, base models, candidates and versions are all kept so. What an artifact is, and how it is read
and verified, is in `retrain_models.artifacts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrain_models.artifacts import MANIFEST, File, Manifest, fetch, is_plain, read_manifest, sha256
from tasks.errors import DataError
from tasks.storage import Store

__all__ = ["MANIFEST", "File", "Manifest", "describe", "fetch", "is_plain", "publish", "read_manifest", "sha256"]


def describe(directory: Path) -> Manifest:
    """The manifest of a local directory, without metadata. A symbolic link is refused: it may lead anywhere."""
    files = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise DataError(f"{path} is a symbolic link; an artifact holds plain files only")
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            if not is_plain(name):
                raise DataError(f"{str(path)!r} has a name that not every system can hold: rename it")
            files.append(File(name, path.stat().st_size, sha256(path)))
    return Manifest(tuple(files))


def publish(
    store: Store, prefix: str, directory: Path, metadata: dict[str, Any] | None = None, *, manifest_name: str = MANIFEST
) -> Manifest:
    """Upload a directory under `prefix`, its manifest last. Safe to repeat: the same files give the same objects.

    Raises `DataError` for a directory without files, and for one with a file that is called like the manifest.
    """
    manifest = Manifest(describe(directory).files, metadata or {})
    if not manifest.files:
        raise DataError(f"{directory} has no files: there is nothing to publish")
    if manifest_name in {file.path for file in manifest.files}:
        raise DataError(f"{directory} has a file {manifest_name}, which is the name of an artifact's manifest")
    store.upload_all({f"{prefix}/{file.path}": directory / file.path for file in manifest.files})
    store.put_json(f"{prefix}/{manifest_name}", manifest.to_dict())
    return manifest
