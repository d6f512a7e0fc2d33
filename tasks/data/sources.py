"""Datasets and base models from where they live: the hub, a local directory, or a mirror in the object store.

All three end as a local directory in the hub's layout, so what follows has one path. `mirror` copies a source into the
store once, for clusters that cannot reach the hub:

    python -m tasks mirror google/flan-t5-base --revision 7bcac57 --kind model --to s3://retrain/mirrors/flan-t5-base
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets.data_files import sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, HfApi, snapshot_download
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
COMMIT = re.compile("[0-9a-f]{40}")
README = "README.md"
HUB_SECONDS = 30

# Never a pickle: weights come as safetensors or not at all.
FILES: dict[Kind, tuple[str, ...]] = {
    "dataset": ("*.parquet", README),
    "model": ("*.safetensors", "*.json", "spiece.model", README),
}


@dataclass(frozen=True)
class Source:
    """A dataset or a model where it lives, before any of it is fetched."""

    kind: Kind
    place: str  # a directory, an s3:// mirror, or a name on the hub
    revision: str | None  # the hub's commit, where it is or was from there
    identity: str  # another one as soon as a file is another one


def find(place: str, revision: str | None, kind: Kind) -> Source:
    """Look where a dataset or a model is, and which one exactly: a branch of the hub is resolved to its commit.

    Raises `SettingsError` for a source that does not exist, `RetryableError` when the hub does not answer.
    """
    if place.startswith("s3://"):
        manifest = _mirror(place)
        mirrored = manifest.metadata.get("revision")
        if revision and not str(mirrored or "").startswith(revision):
            raise SettingsError(
                f"{place} is a mirror of {mirrored or 'no revision'}, not of {revision!r}: change the revision"
            )
        return Source(kind, place, mirrored, manifest.fingerprint)
    if place and Path(place).is_dir():
        if revision:
            raise SettingsError(
                f"{place} is a local directory, which has no revision {revision!r}: remove the revision"
            )
        files = (
            artifacts.File(path.relative_to(place).as_posix(), path.stat().st_size, artifacts.sha256(path))
            for path in _files(Path(place), kind)
        )
        return Source(kind, place, None, artifacts.Manifest(tuple(files)).fingerprint)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", place, re.ASCII):
        raise SettingsError(f"{place!r} is no existing directory, no s3:// mirror and no hub name (owner/name)")
    with _hub_errors(place, revision, kind):
        # A whole commit says all: the hub need not be asked.
        commit = revision if COMMIT.fullmatch(revision or "") else _commit(place, revision, kind)
    return Source(kind, place, commit, f"{place}@{commit}")


def bring(source: Source, scratch: Path, config: str | None = None) -> Path:
    """Fetch a source's files into a directory below `scratch`, or use the local directory they are in.

    Of a dataset's configurations only `config`, where its README says which files those are: others' can be many.
    Raises `RetryableError` when the hub does not answer, or a mirror has been replaced meanwhile.
    """
    if source.place.startswith("s3://"):
        store, key = split_uri(source.place)
        patterns: tuple[str, ...] = ("*",)
        if config and any(file.path == README for file in _mirror(source.place).files):
            artifacts.fetch(store, key, scratch / "readme", wanted=lambda path: path == README)
            patterns = _patterns(scratch / "readme" / README, config)
        directory = scratch / source.kind
        fetched = artifacts.fetch(store, key, directory, wanted=lambda path: any(fnmatch(path, p) for p in patterns))
        if fetched.fingerprint != source.identity:
            raise RetryableError(f"{source.place} was replaced while it was being read: try again")
        return directory
    if Path(source.place).is_dir():
        return Path(source.place)
    with _hub_errors(source.place, source.revision, source.kind):
        patterns = FILES[source.kind]
        which: dict[str, Any] = {"repo_type": source.kind, "revision": source.revision}
        if config:
            readme = Path(snapshot_download(source.place, allow_patterns=[README], **which)) / README
            patterns = _patterns(readme, config) if readme.exists() else patterns
        return Path(snapshot_download(source.place, allow_patterns=list(patterns), **which))


def copy_files(directory: Path, kind: Kind, target: Path) -> None:
    """Copy what belongs to a dataset or model, links followed, leaving everything else behind."""
    for path in _files(directory, kind):
        copy = target / path.relative_to(directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if kind == "model" and not any(target.glob("*.safetensors")):
        raise DataError(f"{directory} has no *.safetensors: a base model's weights are read from safetensors only")
    if kind == "dataset" and not any(target.rglob("*.parquet")):
        raise DataError(f"{directory} has no *.parquet: expected a dataset in the hub's layout")


def mirror(place: str, revision: str | None, kind: Kind, target_uri: str) -> artifacts.Manifest:
    """Copy a dataset or a base model into the object store, as an artifact that `find` and `bring` read."""
    store, key = split_uri(target_uri)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = find(place, revision, kind)
        copy_files(bring(source, scratch), kind, scratch / "files")
        log.info("mirror: %s at %s -> %s", place, source.revision or "no revision", target_uri)
        return artifacts.publish(store, key, scratch / "files", {"source": place, "revision": source.revision})


def _mirror(uri: str) -> artifacts.Manifest:
    """What a mirror in the store holds."""
    try:
        return artifacts.read_manifest(*split_uri(uri))
    except MissingObjectError as error:
        raise SettingsError(f"{uri} is not a mirror: {error}; make one with `python -m tasks mirror`") from error


def _files(directory: Path, kind: Kind) -> Iterator[Path]:
    """What belongs to a dataset or model in a directory."""
    for pattern in FILES[kind]:
        for path in sorted(directory.rglob(pattern)):
            if not path.is_dir():  # a folder of parts may be called train.parquet
                yield path


def _patterns(readme: Path, config: str) -> tuple[str, ...]:
    """Which of a dataset's files belong to a configuration: what its README says, or all where that says nothing."""
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)
        named = sanitize_patterns(configs[config]["data_files"]) if config in configs else {}
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        return FILES["dataset"]
    if not configs:
        return FILES["dataset"]
    # As `fnmatch` reads them, where * stands for folders too: rather a file too many than one too few.
    found = [
        pattern.replace("**/", "*").removesuffix(".parquet") for patterns in named.values() for pattern in patterns
    ]
    return (README, *(f"{pattern.rstrip('*')}*.parquet" for pattern in found))


def _commit(name: str, revision: str | None, kind: Kind) -> str:
    """The commit that a branch, a tag or the beginning of a commit stands for on the hub."""
    return str(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HUB_SECONDS).sha)


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None, kind: Kind) -> Iterator[None]:
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise SettingsError(
            f"the hub has no {kind} {name!r} at revision {revision or 'main'!r}, or shows it only to who has a token: "
            "correct the name or the revision, or set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, RequestException, OSError) as error:
        raise RetryableError(
            f"{name!r} is no directory here, and the hub did not answer ({type(error).__name__}): check the network, "
            f"or set the source to a local directory or an s3:// mirror"
        ) from error
