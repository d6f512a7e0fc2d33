"""Directories in the object store that are whole or do not exist.

An artifact is some files and a manifest that names each with its size and SHA-256. The manifest is written last, so a
prefix without one is an upload that never finished; and a directory appears locally under its own name only when every
file has been checked against it. Datasets, prepared data, base models, candidates and versions are all kept so.

    PREFIX/<files>
    PREFIX/manifest.json      {"files": [{"path", "size", "sha256"}, ...], ...metadata}
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.errors import DataError
from tasks.storage import MissingObjectError, Store, in_parallel

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class File:
    """One file of an artifact: its relative POSIX path, size in bytes and SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact consists of, and what its maker had to say about it."""

    files: tuple[File, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and contents: equal directories have equal fingerprints, wherever they are."""
        lines = sorted(f"{file.sha256}  {file.path}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it is stored."""
        return {**self.metadata, "files": [vars(file) for file in self.files]}


def sha256(path: Path) -> str:
    """A file's SHA-256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def is_plain(name: str) -> bool:
    """Whether a name is a relative POSIX path that means the same file, inside its directory, everywhere."""
    path = PurePosixPath(name)
    return (
        str(path) == name
        and name.isprintable()
        and "\\" not in name
        and path.name != ""
        and ".." not in path.parts
        and not path.is_absolute()
    )


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


def read_manifest(store: Store, prefix: str, *, manifest_name: str = MANIFEST) -> Manifest:
    """The manifest under `prefix`.

    Raises `MissingObjectError` where no upload has finished, `DataError` where the manifest is not one of ours.
    """
    key = f"{prefix}/{manifest_name}"
    try:
        content = store.get_json(key)
        files = tuple(File(str(f["path"]), int(f["size"]), str(f["sha256"])) for f in content.pop("files"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{key} is not a manifest ({error!r}); the artifact cannot be trusted") from error
    names = {file.path for file in files}
    for name in names:
        if not is_plain(name):
            raise DataError(f"{key} names {name!r}, which is not a plain relative path; nothing was downloaded")
        if any(str(folder) in names for folder in PurePosixPath(name).parents):
            raise DataError(f"{key} names {name!r} and, as a file, a folder of it; nothing was downloaded")
    if len(names) != len(files):
        raise DataError(f"{key} names the same file twice; nothing was downloaded")
    return Manifest(files, content)


def fetch(
    store: Store,
    prefix: str,
    directory: Path,
    *,
    manifest_name: str = MANIFEST,
    wanted: Callable[[str], bool] = lambda path: True,
) -> Manifest:
    """Download the artifact under `prefix` to `directory`, which appears only when every file is verified.

    `wanted` chooses files by path, for a reader that needs only some.

    Raises `MissingObjectError` for an artifact that was never completed, `DataError` for a file that is not what the
    manifest says. A directory that is already there gives way only then.
    """
    manifest = read_manifest(store, prefix, manifest_name=manifest_name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()

        def fetch_one(file: File) -> None:
            path = fresh / file.path
            try:
                store.download(f"{prefix}/{file.path}", path)
            except MissingObjectError as error:
                raise DataError(f"{error}, though its manifest names it; nothing was kept") from error
            if path.stat().st_size != file.size or sha256(path) != file.sha256:
                raise DataError(
                    f"s3://{store.bucket}/{prefix}/{file.path} is not the file that its manifest names "
                    f"(size or SHA-256 differs); nothing was kept"
                )

        in_parallel(fetch_one, [file for file in manifest.files if wanted(file.path)])
        if directory.exists():
            directory.rename(Path(scratch) / "previous")
        fresh.rename(directory)
    return manifest
