"""Directories in the object store that are whole or do not exist: how one is read.

An artifact is some files and a manifest that names each with its size and SHA-256. The manifest is written last, so a
prefix without one is an upload that never finished; and a directory appears locally under its own name only when every
file has been checked against it.

    PREFIX/<files>
    PREFIX/manifest.json      {"files": [{"path", "size", "sha256"}, ...], ...metadata}

The files of a model's versions are kept elsewhere, each under its SHA-256, so that versions share what they have in
common: `shared` names that place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from retrain_models.errors import DataError, MissingObjectError, RetryableError
from retrain_models.storage import TRANSFERS, Bucket, disk_of

MANIFEST = "manifest.json"
PART = 16 << 20  # bytes of a file that are asked for at once


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


def read_manifest(store: Bucket, prefix: str, *, manifest_name: str = MANIFEST) -> Manifest:
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
    for file in files:
        if not is_plain(file.path):
            raise DataError(f"{key} names {file.path!r}, which is not a plain relative path; nothing was downloaded")
        if any(str(folder) in names for folder in PurePosixPath(file.path).parents):
            raise DataError(f"{key} names {file.path!r} and, as a file, a folder of it; nothing was downloaded")
        if file.size < 0 or len(file.sha256) != 64 or set(file.sha256) - set("0123456789abcdef"):
            raise DataError(f"{key} has no size or SHA-256 of {file.path!r} that can be one; nothing was downloaded")
    if len(names) != len(files):
        raise DataError(f"{key} names the same file twice; nothing was downloaded")
    return Manifest(files, content)


def fetch(
    store: Bucket,
    prefix: str,
    directory: Path,
    *,
    manifest_name: str = MANIFEST,
    wanted: Callable[[str], bool] = lambda path: True,
    shared: str | None = None,
    reuse: Sequence[Path] = (),
    keep_previous: bool = False,
    advance: Callable[[int], Any] = lambda count: None,
) -> Manifest:
    """Download the artifact under `prefix` to `directory`, which appears only when every file is verified.

    `wanted` chooses files by path, for a reader that needs only some. `shared` is where the files are kept by their
    SHA-256; without it they are beside the manifest. A file that one of the directories in `reuse` has already is
    linked from there (and verified like any other). `advance` is told of bytes as they arrive.

    A download that was interrupted leaves `.NAME.partial` beside the directory, and the next one goes on from there.
    A directory that is already there gives way only at the end; `keep_previous` leaves it as `NAME.previous`.

    Raises `MissingObjectError` for an artifact that was never completed, `DataError` for a file that is not what the
    manifest says, `RetryableError` while another process downloads to the same directory or the disk is too full.
    """
    manifest = read_manifest(store, prefix, manifest_name=manifest_name)
    files = [file for file in manifest.files if wanted(file.path)]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with disk_of(directory.parent), _claimed(directory.parent / f".{directory.name}.partial") as partial:
        try:
            _download(store, shared or prefix, partial, files, _Options(shared is not None, reuse, advance))
        except DataError:
            shutil.rmtree(partial)  # nobody knows which bytes are good
            raise
        previous = directory.with_name(f"{directory.name}.previous")
        if directory.exists():
            if not keep_previous:
                previous = partial / "previous"
            elif previous.exists():
                previous.rename(partial / "older")
            directory.rename(previous)
        (partial / "files").rename(directory)
        shutil.rmtree(partial)
    return manifest


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[Path]:
    """A folder for what is not complete yet, for this process alone; it stays when something goes wrong."""
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or partial.stat().st_ino != os.fstat(lock).st_ino:
            raise BlockingIOError  # it was another process's until just now
        yield partial
    except BlockingIOError:
        raise RetryableError(f"another process is downloading to {partial}: wait for it") from None
    finally:
        os.close(lock)


def _download(store: Bucket, place: str, partial: Path, files: list[File], options: _Options) -> None:
    """Fill `partial/files`: every file fetched in parts, several at once, and hashed in order while others arrive."""
    tree, parts = partial / "files", partial / "parts"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    parts.mkdir(exist_ok=True)
    incoming: dict[str, _Incoming] = {}
    for file in files:
        found = options.find(file)
        if found:
            _link(found, tree / file.path)
        else:  # equal files are fetched once
            incoming.setdefault(file.sha256, _Incoming(store, place, file, parts, options))
    needed = sum(one.file.size - one.on_disk for one in incoming.values())
    room = shutil.disk_usage(partial).free
    if needed > room:
        raise RetryableError(f"{partial.parent} has {room:,} bytes left and {needed:,} are needed: make room")
    with ThreadPoolExecutor(max_workers=TRANSFERS) as pool:
        try:
            for one in incoming.values():
                one.start(pool)
            for one in incoming.values():
                one.verify(pool)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for file in files:
        if not (tree / file.path).exists():
            _link(parts / file.sha256, tree / file.path)


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system
        shutil.copyfile(path, target)


@dataclass(frozen=True)
class _Options:
    """How files are found and counted."""

    by_digest: bool
    reuse: Sequence[Path]
    advance: Callable[[int], Any]

    def find(self, file: File) -> Path | None:
        """A local file of this name that is the wanted one, as its SHA-256 says."""
        for place in self.reuse:
            path = place / file.path
            if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
                continue
            if sha256(path) == file.sha256:
                return path
        return None


class _Incoming:
    """One file on its way: `parts/SHA256` fills up, and `parts/SHA256.done` lists which parts are there."""

    def __init__(self, store: Bucket, place: str, file: File, folder: Path, options: _Options) -> None:
        self.store, self.file, self.options = store, file, options
        self.key = f"{place}/{file.sha256 if options.by_digest else file.path}"
        self.path, self.done = folder / file.sha256, folder / f"{file.sha256}.done"
        self.resumed = self.path.exists()
        self.futures: dict[int, Future[None]] = {}

    @property
    def on_disk(self) -> int:
        """Bytes that an earlier try has left."""
        return self.path.stat().st_blocks * 512 if self.resumed else 0

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Ask for every part that is not there yet."""
        there = set(self.done.read_text().split()) if self.resumed and self.done.exists() else set()
        starts = [start for start in range(0, max(self.file.size, 1), PART) if str(start) not in there]
        self.futures = {start: pool.submit(self._fetch, start) for start in starts}

    def _fetch(self, start: int) -> None:
        output = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            size = self._copy(output, start)
        except MissingObjectError as error:
            raise DataError(f"{error}, though its manifest names it; nothing was kept") from error
        finally:
            os.close(output)
        if size != self.file.size:
            raise self._wrong
        with self.done.open("a") as done:
            done.write(f"{start}\n")

    def _copy(self, output: int, start: int) -> int:
        if self.file.size == 0:  # there is no range of nothing
            return self.store.size(self.key)
        return self.store.read_into(self.key, output, start, min(PART, self.file.size - start), self.options.advance)

    def verify(self, pool: ThreadPoolExecutor) -> None:
        """Hash the parts in order, each as soon as it has arrived. Raises `DataError` when they are not the file."""
        digest = hashlib.sha256()
        for start in range(0, max(self.file.size, 1), PART):
            if start in self.futures:
                self.futures[start].result()
            with self.path.open("rb") as stream:
                stream.seek(start)
                digest.update(stream.read(PART))
        if digest.hexdigest() == self.file.sha256 and self.path.stat().st_size == self.file.size:
            return
        if not self.resumed:
            raise self._wrong
        self.resumed = False  # an earlier try left something else: all over again
        self.path.unlink()
        self.done.unlink(missing_ok=True)
        self.start(pool)
        self.verify(pool)

    @property
    def _wrong(self) -> DataError:
        return DataError(
            f"s3://{self.store.bucket}/{self.key} is not the file that its manifest names "
            f"(size or SHA-256 differs); nothing was kept"
        )
