"""What services use: the package by itself, the shell example, and pulls that meet every kind of fault."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import retrain_models
from retrain_models import artifacts as reading
from retrain_models.errors import DataError, RetryableError, StoreRefusedError, StoreUnreachableError
from tasks import registry
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
MODEL = "m"
FROZEN = os.urandom(300_000)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in many parts, without large files."""
    monkeypatch.setattr(reading, "PART", 100_000)


def files_in(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def content(version: str) -> dict[str, bytes]:
    return {"frozen.bin": FROZEN, "sub/trained.bin": version.encode() * 60_000, "empty.txt": b"", "name": b"m"}


def publish(store: Store, tmp_path: Path, version: str) -> None:
    directory = tmp_path / "made" / version
    for name, data in content(version).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    registry.publish(store, MODEL, version, directory, {"version": version})


def promote(store: Store, tmp_path: Path, version: str, before: str | None = None) -> None:
    publish(store, tmp_path, version)
    registry.move(store, MODEL, version, expected=before, who="w", why="y")


# The package by itself


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it, built from a copy so that nothing is left beside the source."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "retrain_models", folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([*pip, *options, str(folder / "source")], check=True)
    return folder / "site"


def test_it_needs_boto3_and_nothing_else_of_the_project(installed: Path, store: Store, tmp_path: Path) -> None:
    promote(store, tmp_path, "1")
    code = """
import sys, retrain_models
pulled = retrain_models.pull("m", "production", "model")
print(pulled.version, next(retrain_models.watch("m")), retrain_models.__file__)
mine = {name.partition(".")[0] for name in sys.modules}
print(sorted(mine & {"tasks", "airflow", "tensorflow", "pydantic", "yaml", "numpy", "rich"}))
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == f"1 1 {installed / 'retrain_models' / '__init__.py'}"
    assert second == "[]"
    assert files_in(tmp_path / "model") == content("1")


def test_its_metadata_asks_for_boto3_only(installed: Path) -> None:
    (metadata,) = installed.glob("retrain_models-*.dist-info/METADATA")
    required = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    assert required == ["Requires-Dist: boto3>=1.36"]


# The shell example


@pytest.fixture(params=["aws", "curl"])
def search_path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A PATH on which the shell example finds this S3 client, and no other if it is curl."""
    tools = ["bash", "jq", "sha256sum", "mktemp", "mkdir", "dirname", "mv", "rm", "chmod", request.param]
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"no {', '.join(missing)} on PATH, which the shell example needs")
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in tools:
        (folder / tool).symlink_to(str(shutil.which(tool)))
    if request.param == "curl":
        return str(folder)
    if subprocess.run(["aws", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("the aws on PATH does not start")
    return os.environ["PATH"]


def pull_in_shell(search_path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(ROOT / "retrain_models" / "pull.sh"), MODEL, *arguments]
    environment = {**os.environ, "PATH": search_path, "AWS_REGION": "us-east-1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_shell_pulls_with_any_s3_client(search_path: str, store: Store, tmp_path: Path) -> None:
    promote(store, tmp_path, "1")
    publish(store, tmp_path, "2")
    done = pull_in_shell(search_path, str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "model") == content("1")
    assert pull_in_shell(search_path, str(tmp_path / "two"), "2").returncode == 0
    assert files_in(tmp_path / "two") == content("2")
    key = f"models/m/files/{hashlib.sha256(FROZEN).hexdigest()}"
    store.put(key, FROZEN[:-1] + bytes([FROZEN[-1] ^ 1]))
    done = pull_in_shell(search_path, str(tmp_path / "damaged"))
    assert done.returncode != 0
    assert "did NOT match" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "made", "model", "two"}


# Pulling


def test_what_has_not_changed_is_not_downloaded_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, tmp_path, "1")
    asked: list[str] = []
    read_into = retrain_models.Bucket.read_into
    monkeypatch.setattr(
        retrain_models.Bucket, "read_into", lambda self, key, *rest: asked.append(key) or read_into(self, key, *rest)
    )
    assert retrain_models.pull(MODEL, "production", tmp_path / "model").version == "1"
    promote(store, tmp_path, "2", "1")
    asked.clear()
    pulled = retrain_models.pull(MODEL, "production", tmp_path / "model")
    assert (pulled.version, pulled.directory) == ("2", tmp_path / "model")
    assert pulled.manifest.metadata == {"version": "2"}
    assert {key.rpartition("/")[2] for key in asked} == {hashlib.sha256(content("2")["sub/trained.bin"]).hexdigest()}
    assert files_in(tmp_path / "model") == content("2")
    assert files_in(tmp_path / "model.previous") == content("1")
    asked.clear()
    retrain_models.pull(MODEL, "1", tmp_path / "model")  # back: everything is here
    assert not asked
    assert files_in(tmp_path / "model") == content("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "model", "model.previous"]


def test_a_copy_in_int8_comes_only_when_it_is_wanted_and_there(store: Store, tmp_path: Path) -> None:
    full = {"model.safetensors": b"weights", "tokenizer.json": b"{}"}
    for version, more in (("1", {}), ("2", {"ctranslate2/model.bin": b"int8"})):
        for name, data in {**full, **more}.items():
            (tmp_path / version / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / version / name).write_bytes(data)
        registry.publish(store, MODEL, version, tmp_path / version, {})

    def pulled(version: str, *, int8: bool) -> dict[str, bytes]:
        return files_in(
            retrain_models.pull(MODEL, version, tmp_path / "model", int8=int8, bucket=store.bucket).directory
        )

    assert pulled("1", int8=True) == pulled("1", int8=False) == pulled("2", int8=False) == full
    assert pulled("2", int8=True) == {"ctranslate2/model.bin": b"int8", "tokenizer.json": b"{}"}


def test_a_file_of_the_previous_model_that_was_changed_is_downloaded(store: Store, tmp_path: Path) -> None:
    promote(store, tmp_path, "1")
    retrain_models.pull(MODEL, "production", tmp_path / "model")
    (tmp_path / "model" / "frozen.bin").write_bytes(b"x" * len(FROZEN))
    (tmp_path / "model" / "name").unlink()
    (tmp_path / "model" / "name").symlink_to("/etc/hostname")
    retrain_models.pull(MODEL, "production", tmp_path / "model")
    assert files_in(tmp_path / "model") == content("1")
    assert not (tmp_path / "model" / "name").is_symlink()


class Cut(retrain_models.Bucket):
    """A bucket that is unreachable after a number of parts."""

    left = 0
    parts: list[int]

    def read_into(self, key: str, file: int, start: int, length: int, advance: Callable[[int], Any]) -> int:
        self.left -= 1
        if self.left < 0:
            raise StoreUnreachableError("the connection was cut")
        self.parts.append(length)
        return super().read_into(key, file, start, length, advance)


def fetch(bucket: retrain_models.Bucket, directory: Path) -> None:
    registry.pull(bucket, MODEL, "1", directory)


def test_a_pull_goes_on_where_it_was_interrupted(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path, "1")
    bucket = Cut(store.bucket)
    bucket.parts = []
    for _ in itertools.count():
        bucket.left = 1
        try:
            fetch(bucket, tmp_path / "model")
            break
        except StoreUnreachableError:
            assert not (tmp_path / "model").exists()
    assert sum(bucket.parts) == sum(len(data) for data in content("1").values())  # no byte twice
    assert files_in(tmp_path / "model") == content("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "model"]


@pytest.mark.parametrize("damage", [b"", b"short", os.urandom(len(FROZEN))])
def test_what_an_interrupted_pull_left_is_not_trusted(damage: bytes, store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path, "1")
    parts = tmp_path / ".model.partial" / "parts"
    parts.mkdir(parents=True)
    digest = hashlib.sha256(FROZEN).hexdigest()
    (parts / digest).write_bytes(damage)
    (parts / f"{digest}.done").write_text("0\n100000\n200000\n")
    fetch(store, tmp_path / "model")
    assert files_in(tmp_path / "model") == content("1")


def test_two_processes_do_not_pull_to_one_directory_at_once(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path, "1")
    inside, go = threading.Event(), threading.Event()

    class Waiting(retrain_models.Bucket):
        def read_into(self, *args: Any) -> int:
            inside.set()
            go.wait(20)
            return super().read_into(*args)

    first = threading.Thread(target=fetch, args=(Waiting(store.bucket), tmp_path / "model"))
    first.start()
    assert inside.wait(20)
    with pytest.raises(RetryableError, match="another process is downloading to"):
        fetch(store, tmp_path / "model")
    go.set()
    first.join()
    assert files_in(tmp_path / "model") == content("1")
    fetch(store, tmp_path / "model")


# What is not what was published


def change(path: str | None = None, **fields: Any) -> Callable[[Store], Any]:
    def apply(store: Store) -> None:
        key = "models/m/versions/1/manifest.json"
        manifest = store.get_json(key)
        (entry,) = (file for file in manifest["files"] if file["path"] == "name")
        entry.update(fields, **({"path": path} if path is not None else {}))
        store.put_json(key, manifest)

    return apply


SHARED = f"models/m/files/{hashlib.sha256(FROZEN).hexdigest()}"
EVIL: dict[str, Callable[[Store], Any]] = {
    "the first byte is another": lambda store: store.put(SHARED, bytes([FROZEN[0] ^ 1]) + FROZEN[1:]),
    "the last byte is another": lambda store: store.put(SHARED, FROZEN[:-1] + bytes([FROZEN[-1] ^ 1])),
    "a byte is missing": lambda store: store.put(SHARED, FROZEN[:-1]),
    "there is a byte too many": lambda store: store.put(SHARED, FROZEN + b"x"),
    "most of it is missing": lambda store: store.put(SHARED, FROZEN[:10]),
    "it is empty": lambda store: store.put(SHARED, b""),
    "a file is missing": lambda store: store.delete(SHARED),
    "the empty file is missing": lambda store: store.delete(f"models/m/files/{hashlib.sha256(b'').hexdigest()}"),
    "a parent's file": change("../outside"),
    "an absolute path": change("/tmp/outside"),  # noqa: S108
    "a hidden parent": change("sub/../../outside"),
    "another system's separator": change("..\\outside"),
    "a file below a file": change("frozen.bin/x"),
    "ten gigabytes": change(size=10_000_000_000),
    "more than any disk": change(size=10**18),
    "less than nothing": change(size=-1),
    "a SHA-256 that is a path": change(sha256="../../other/files/" + "0" * 45),
    "a SHA-256 of nothing that is there": change(sha256="0" * 64),
    "another model's file": change(sha256=hashlib.sha256(b"other").hexdigest(), size=5),
    "no list of files": lambda store: store.put_json("models/m/versions/1/manifest.json", {"files": "all"}),
}


@pytest.mark.parametrize("fault", EVIL)
def test_what_is_not_what_was_published_is_refused(
    fault: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART", 1 << 24 if fault == "ten gigabytes" else reading.PART)
    publish(store, tmp_path, "1")
    registry.move(store, MODEL, "1", expected=None, who="w", why="y")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "name").write_bytes(b"other")
    registry.publish(store, "other", "1", tmp_path / "other", {})
    EVIL[fault](store)
    target = tmp_path / "target"
    (target / "model").mkdir(parents=True)
    (target / "model" / "yesterday").write_text("whole")
    with pytest.raises((DataError, RetryableError)) as caught:
        retrain_models.pull(MODEL, "production", target / "model")
    assert isinstance(caught.value, RetryableError) == (fault == "more than any disk")
    assert files_in(target / "model") == {"yesterday": b"whole"}
    assert {path.name for path in target.iterdir()} <= {"model", ".model.partial"}
    assert not (tmp_path / "outside").exists()
    if fault != "more than any disk":
        assert [path.name for path in target.iterdir()] == ["model"]


def test_a_file_that_the_manifest_does_not_name_is_not_downloaded(store: Store, tmp_path: Path) -> None:
    promote(store, tmp_path, "1")
    for key in ("models/m/versions/1/extra.bin", "models/m/files/extra.bin"):
        store.put(key, b"extra")
    retrain_models.pull(MODEL, "production", tmp_path / "model")
    assert files_in(tmp_path / "model") == content("1")


def test_a_link_in_the_place_of_the_partial_download_is_not_followed(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path, "1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".model.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="partial"):
        fetch(store, tmp_path / "model")
    assert not list((tmp_path / "elsewhere").iterdir())


# Watching


def test_watching_tells_each_move_and_transfers_nothing_in_between(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[bool] = []
    ask = retrain_models.Bucket.get_if_changed

    def get_if_changed(self: Any, key: str, etag: str | None) -> Any:
        found = ask(self, key, etag)
        if etag:
            answers.append(found is not None)
        return found

    monkeypatch.setattr(retrain_models.Bucket, "get_if_changed", get_if_changed)
    versions = retrain_models.watch(MODEL, seconds=0.02)
    mover = threading.Timer(0.3, promote, (store, tmp_path, "1"))
    mover.start()  # it waits for the first promotion
    assert next(versions) == "1"
    mover.join()
    publish(store, tmp_path, "2")
    mover = threading.Timer(0.5, lambda: registry.move(store, MODEL, "2", expected="1", who="w", why="y"))
    mover.start()
    assert next(versions) == "2"
    mover.join()
    assert answers.count(True) == 1
    assert answers.count(False) >= 2
    versions.close()


def test_watching_waits_while_the_store_is_away(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    promote(store, tmp_path, "1")
    faults: Iterator[Any] = iter([StoreUnreachableError("away"), StoreUnreachableError("still away"), None, None])
    ask = retrain_models.Bucket.get_if_changed

    def get_if_changed(self: Any, key: str, etag: str | None) -> Any:
        if fault := next(faults):
            raise fault
        return ask(self, key, etag)

    monkeypatch.setattr(retrain_models.Bucket, "get_if_changed", get_if_changed)
    assert next(retrain_models.watch(MODEL, seconds=0.01)) == "1"
    assert "m is not known to be up to date: still away" in caplog.text


def test_a_pointer_that_is_damaged_is_no_news(store: Store) -> None:
    store.put(registry.pointer_key(MODEL), json.dumps({"version": "../x", "event": 1}).encode())
    with pytest.raises(DataError):
        next(retrain_models.watch(MODEL, seconds=0.01))
    with pytest.raises(StoreRefusedError, match="there is no bucket"):
        next(retrain_models.watch(MODEL, bucket="no-such-bucket", seconds=0.01))
