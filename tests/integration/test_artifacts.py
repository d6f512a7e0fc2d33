"""Artifacts are whole or do not exist: on both servers, with uploads cut off and contents tampered with."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import artifacts
from tasks.artifacts import File, Manifest
from tasks.errors import DataError
from tasks.storage import MissingObjectError, Store, StoreUnreachableError

CONTENT = {"config.json": b"{}", "weights/one.bin": b"1" * 5000, "weights/two.bin": b""}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory to publish."""
    for name, content in CONTENT.items():
        path = tmp_path / "original" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "original"


def files_in(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_what_is_published_is_fetched_whole(store: Store, directory: Path, tmp_path: Path) -> None:
    published = artifacts.publish(store, "a", directory, {"run": "r"})
    fetched = artifacts.fetch(store, "a", tmp_path / "copy")
    assert files_in(tmp_path / "copy") == CONTENT
    assert fetched == published
    assert fetched.metadata == {"run": "r"}
    assert fetched.size == 5002


def test_a_reader_may_take_some_files_only(store: Store, directory: Path, tmp_path: Path) -> None:
    artifacts.publish(store, "a", directory)
    artifacts.fetch(store, "a", tmp_path / "copy", wanted=lambda path: path.endswith(".json"))
    assert list(files_in(tmp_path / "copy")) == ["config.json"]


def test_a_newer_artifact_takes_the_place_of_an_older_copy(store: Store, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "stale").write_text("stale")
    artifacts.publish(store, "a", directory)
    artifacts.fetch(store, "a", tmp_path / "copy")
    assert files_in(tmp_path / "copy") == CONTENT


class Dying(Store):
    """A store of which nothing more is heard after a number of writes."""

    def __init__(self, bucket: str, writes: int) -> None:
        super().__init__(bucket)
        self.left = writes

    def _count(self) -> None:
        if self.left == 0:
            raise StoreUnreachableError("the connection was cut")
        self.left -= 1

    def put(self, *args: Any, **kwargs: Any) -> str:
        self._count()
        return super().put(*args, **kwargs)

    def upload(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        super().upload(*args, **kwargs)


@pytest.mark.parametrize("writes", range(len(CONTENT) + 1))
def test_an_upload_that_is_cut_off_anywhere_does_not_exist_and_can_be_repeated(
    writes: int, store: Store, directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreUnreachableError):
        artifacts.publish(Dying(store.bucket, writes), "a", directory)
    with pytest.raises(MissingObjectError):
        artifacts.fetch(store, "a", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    artifacts.publish(store, "a", directory)
    artifacts.fetch(store, "a", tmp_path / "copy")
    assert files_in(tmp_path / "copy") == CONTENT


def test_a_file_that_vanishes_during_an_upload_leaves_nothing_to_read(
    store: Store, directory: Path, tmp_path: Path
) -> None:
    class Vanishing(Store):
        def upload(self, path: Path, key: str, **more: Any) -> None:
            path.unlink()
            super().upload(path, key, **more)

    with pytest.raises(FileNotFoundError):
        artifacts.publish(Vanishing(store.bucket), "a", directory)
    with pytest.raises(MissingObjectError):
        artifacts.fetch(store, "a", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_file_that_changes_during_an_upload_is_refused_by_readers(
    store: Store, directory: Path, tmp_path: Path
) -> None:
    class Changing(Store):
        def upload(self, path: Path, key: str, **more: Any) -> None:
            path.write_bytes(path.read_bytes() + b"more")
            super().upload(path, key, **more)

    artifacts.publish(Changing(store.bucket), "a", directory)
    with pytest.raises(DataError, match="is not the file that its manifest names"):
        artifacts.fetch(store, "a", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_upload_replaces_what_an_older_one_left(store: Store, directory: Path, tmp_path: Path) -> None:
    artifacts.publish(store, "a", directory)
    (directory / "config.json").write_text("new")
    (directory / "weights" / "two.bin").unlink()
    artifacts.publish(store, "a", directory)
    artifacts.fetch(store, "a", tmp_path / "copy")
    assert files_in(tmp_path / "copy") == {"config.json": b"new", "weights/one.bin": CONTENT["weights/one.bin"]}


def change_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Store], None]:
    def apply(store: Store) -> None:
        content = store.get_json("a/manifest.json")
        change(content)
        store.put_json("a/manifest.json", content)

    return apply


def named(path: str) -> Callable[[Store], None]:
    return change_manifest(lambda content: content["files"][0].update(path=path))


TAMPERED: dict[str, Callable[[Store], Any]] = {
    "a flipped byte": lambda store: store.put("a/weights/one.bin", b"1" * 4999 + b"0"),
    "a file cut short": lambda store: store.put("a/weights/one.bin", b"1" * 4999),
    "another size in the manifest": change_manifest(lambda content: content["files"][0].update(size=1)),
    "a file twice": change_manifest(lambda content: content["files"].append(content["files"][0])),
    "a parent's path": named("../outside"),
    "a hidden parent's path": named("weights/../../outside"),
    "an absolute path": named("/tmp/outside"),  # noqa: S108
    "a Windows path": named("..\\outside"),
    "an empty path": named(""),
    "the directory itself": named("."),
    "a name with a zero byte": named("config.json\0"),
    "a file in a file": named("weights/one.bin/config.json"),
    "a size that is no number": lambda store: store.put(
        "a/manifest.json", store.get("a/manifest.json").replace(b'"size": 2', b'"size": 1e999')
    ),
    "a file that is not there": lambda store: store._client.delete_object(Bucket=store.bucket, Key="a/weights/one.bin"),
    "no manifest but other JSON": lambda store: store.put("a/manifest.json", b"[]"),
    "a manifest cut short": lambda store: store.put("a/manifest.json", b'{"files": ['),
    "a manifest without files": change_manifest(lambda content: content.pop("files")),
    "files without checksums": change_manifest(lambda content: content["files"][0].pop("sha256")),
}


@pytest.mark.parametrize("fault", TAMPERED)
def test_what_is_not_what_was_published_is_refused_and_leaves_no_trace(
    fault: str, bucket: Store, directory: Path, tmp_path: Path
) -> None:
    artifacts.publish(bucket, "a", directory)
    TAMPERED[fault](bucket)
    target = tmp_path / "target"
    (target / "copy").mkdir(parents=True)
    (target / "copy" / "yesterday").write_text("whole")
    with pytest.raises(DataError, match=r"a/(manifest\.json|weights/one\.bin|config\.json)"):
        artifacts.fetch(bucket, "a", target / "copy")
    assert files_in(target) == {"copy/yesterday": b"whole"}
    assert not (tmp_path / "outside").exists()
    assert [path.name for path in target.iterdir()] == ["copy"]


def test_a_file_that_is_missing_is_named_and_not_taken_for_an_upload_that_never_finished(
    bucket: Store, directory: Path, tmp_path: Path
) -> None:
    artifacts.publish(bucket, "b", directory)
    change_file = {"path": "gone", "size": 1, "sha256": "0" * 64}
    content = bucket.get_json("b/manifest.json")
    bucket.put_json("b/manifest.json", {**content, "files": [*content["files"], change_file]})
    with pytest.raises(DataError, match="b/gone does not exist, though its manifest names it; nothing was kept"):
        artifacts.fetch(bucket, "b", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "a/b", "..", "/", ""]) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["files", "path", "size", "sha256"]), inner),
)
ENTRIES = st.fixed_dictionaries({"path": JSON, "size": JSON, "sha256": JSON})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON | st.fixed_dictionaries({"files": st.lists(ENTRIES)}))
def test_whatever_is_in_a_manifests_place_is_a_manifest_or_refused(bucket: Store, content: Any) -> None:
    bucket.put("any/manifest.json", json.dumps(content).encode("utf-8", "surrogatepass"))
    try:
        manifest = artifacts.read_manifest(bucket, "any")
    except DataError:
        return
    inside = Path("/scratch/inside")
    assert all(inside in (inside / file.path).parents for file in manifest.files)
    assert not any(".." in file.path.split("/") for file in manifest.files)


@given(st.sets(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40), min_size=1))
def test_a_name_that_is_described_is_one_that_a_reader_accepts(names: set[str]) -> None:
    names -= {".", ".."}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).write_bytes(b"")
        if any("\\" in name or not name.isprintable() for name in names):
            with pytest.raises(DataError, match="has a name that not every system can hold"):
                artifacts.describe(Path(folder))
        else:
            described = artifacts.describe(Path(folder))
            assert {file.path for file in described.files} == names
            assert all(artifacts.is_plain(name) for name in names)


def test_what_could_not_be_fetched_again_is_not_published(store: Store, tmp_path: Path) -> None:
    empty, own, odd = (tmp_path / name for name in ("empty", "own", "odd"))
    for directory in (empty, own, odd):
        directory.mkdir()
    (own / "manifest.json").write_text("{}")
    (odd / "a\\b").write_text("")
    for directory, message in {
        empty: "has no files: there is nothing to publish",
        tmp_path / "none": "has no files: there is nothing to publish",
        own: "has a file manifest.json, which is the name of an artifact's manifest",
        odd: "has a name that not every system can hold",
    }.items():
        with pytest.raises(DataError, match=message):
            artifacts.publish(store, "a", directory)
    assert not list(store.list("a/"))


def test_a_symbolic_link_is_not_published(directory: Path) -> None:
    (directory / "link").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="symbolic link"):
        artifacts.describe(directory)


@given(st.dictionaries(st.text(min_size=1), st.binary(), min_size=1), st.randoms())
def test_a_fingerprint_depends_on_names_and_contents_only(content: dict[str, bytes], random: Any) -> None:
    files = [File(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()]
    shuffled = random.sample(files, len(files))
    assert Manifest(tuple(files)).fingerprint == Manifest(tuple(shuffled), {"run": "other"}).fingerprint
    renamed = [File(files[0].path + "x", files[0].size, files[0].sha256), *files[1:]]
    assert Manifest(tuple(renamed)).fingerprint != Manifest(tuple(files)).fingerprint
