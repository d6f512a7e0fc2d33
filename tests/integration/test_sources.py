"""Where datasets and base models come from: a directory, a mirror in the store, the hub; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import free_port
from hypothesis import assume, given
from hypothesis import strategies as st
from stand_in_hub import Hub, running_hub

from tasks import artifacts
from tasks.__main__ import main
from tasks.data import sources
from tasks.errors import DataError, RetryableError, SettingsError
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "examples" / "demo" / "corpus"
MODEL = ROOT / "examples" / "demo" / "base-model"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub-cache", free_port()) as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A base model's directory, with all that people leave in one."""
    directory = tmp_path / "model"
    (directory / ".git").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "spiece.model", "README.md", "pytorch_model.bin", ".git/HEAD"):
        (directory / name).write_text(name)
    return directory


def bring(place: str, revision: str | None, kind: sources.Kind, scratch: Path) -> Path:
    return sources.bring(sources.find(place, revision, kind), scratch)


def files_in(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_a_local_directory_is_used_where_it_is(tmp_path: Path) -> None:
    assert bring(str(CORPUS), None, "dataset", tmp_path) == CORPUS
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "original"), [("dataset", CORPUS), ("model", MODEL)])
def test_a_mirror_made_on_the_command_line_holds_the_original(
    kind: sources.Kind, original: Path, store: Store, tmp_path: Path
) -> None:
    uri = f"s3://{store.bucket}/mirrors/{kind}"
    assert main(["mirror", str(original), "--kind", kind, "--to", uri]) == 0
    assert sources.find(uri, None, kind).revision is None
    assert files_in(bring(uri, None, kind, tmp_path)) == files_in(original)
    assert artifacts.read_manifest(store, f"mirrors/{kind}").metadata["source"] == str(original)


def test_a_mirror_of_a_mirror_is_the_same(bucket: Store, model: Path, tmp_path: Path) -> None:
    one, two = (f"s3://{bucket.bucket}/copies/{name}" for name in ("one", "two"))
    first = sources.mirror(str(model), None, "model", one)
    assert sources.mirror(one, None, "model", two).fingerprint == first.fingerprint
    assert set(files_in(bring(two, None, "model", tmp_path))) == {
        *("model.safetensors", "config.json", "spiece.model", "README.md"),
    }


@pytest.mark.parametrize(
    ("revision", "accepted"), [(None, True), ("7bcac572ce56", True), ("7bcac5", True), ("805090d", False)]
)
def test_a_mirror_is_of_the_revision_that_is_asked_for(
    revision: str | None, accepted: bool, bucket: Store, model: Path, tmp_path: Path
) -> None:
    artifacts.publish(bucket, "pinned", model, {"source": "google/flan-t5-base", "revision": "7bcac572ce56"})
    uri = f"s3://{bucket.bucket}/pinned"
    if accepted:
        assert sources.find(uri, revision, "model").revision == "7bcac572ce56"
    else:
        with pytest.raises(SettingsError, match=f"is a mirror of 7bcac572ce56, not of '{revision}'"):
            bring(uri, revision, "model", tmp_path / "scratch")


def test_a_mirror_of_a_local_directory_has_no_revision(bucket: Store, model: Path, tmp_path: Path) -> None:
    uri = f"s3://{bucket.bucket}/local"
    sources.mirror(str(model), None, "model", uri)
    for number, revision in enumerate(("7bcac57", "None", "N")):
        with pytest.raises(SettingsError, match=f"is a mirror of no revision, not of '{revision}'"):
            bring(uri, revision, "model", tmp_path / str(number))


def test_a_mirror_that_was_tampered_with_is_refused(store: Store, model: Path, tmp_path: Path) -> None:
    uri = f"s3://{store.bucket}/mirrors/m"
    sources.mirror(str(model), None, "model", uri)
    store.put("mirrors/m/model.safetensors", b"other weights")
    with pytest.raises(DataError, match="is not the file that its manifest names"):
        bring(uri, None, "model", tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def test_pickled_weights_alone_are_no_model(store: Store, model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no \*\.safetensors: a base model's weights are read from safetensors"):
        sources.mirror(str(model), None, "model", f"s3://{store.bucket}/mirrors/m")
    assert not list(store.list("mirrors/"))


def test_a_directory_without_tables_is_no_dataset(store: Store, model: Path) -> None:
    with pytest.raises(DataError, match=r"has no \*\.parquet: expected a dataset in the hub's layout"):
        sources.mirror(str(model), None, "dataset", f"s3://{store.bucket}/mirrors/d")
    assert not list(store.list("mirrors/"))


def test_a_table_in_parts_is_copied_with_its_folder(tmp_path: Path) -> None:
    parts = tmp_path / "data" / "en-es" / "train.parquet"
    parts.mkdir(parents=True)
    for number in range(2):
        (parts / f"part-{number}.parquet").write_text(str(number))
    sources.copy_files(tmp_path / "data", "dataset", tmp_path / "copy")
    assert files_in(tmp_path / "copy") == files_in(tmp_path / "data")


def test_links_as_in_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    sources.copy_files(model, "model", tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_text() == "model.safetensors"
    assert not (tmp_path / "copy" / "model.safetensors").is_symlink()
    blob.unlink()
    with pytest.raises(FileNotFoundError):  # and not a copy without the weights
        sources.copy_files(model, "model", tmp_path / "again")


def test_a_local_directory_has_no_revision(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is a local directory, which has no revision 'main': remove the revision"):
        bring(str(model), "main", "model", tmp_path)


def test_a_place_without_a_mirror_is_refused(store: Store, tmp_path: Path) -> None:
    store.put("mirrors/torn/model.safetensors", b"")  # an upload that never finished
    for name in ("torn", "none"):
        with pytest.raises(SettingsError, match=r"is not a mirror: .*; make one with `python -m tasks mirror`"):
            bring(f"s3://{store.bucket}/mirrors/{name}", None, "model", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source", ["", " ", "model", "not a name", "../model", "./model", "/no/such/model", "a/b/c", "ñ/ñ"]
)
def test_a_name_that_is_nothing_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"is no existing directory, no s3:// mirror and no hub name \(owner/name\)"
    ):
        bring(source, None, "model", tmp_path)


@given(st.text() | st.from_regex(r"[\w.-]+/[\w.-]+", fullmatch=True))
def test_any_name_is_refused_or_may_be_on_the_hub(source: str) -> None:
    assume(not Path(source).is_dir())
    with pytest.raises((SettingsError, RetryableError)):
        bring(source, None, "model", Path("nowhere"))


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_a_hub_that_does_not_answer_is_worth_another_try(kind: sources.Kind, tmp_path: Path) -> None:
    with pytest.raises(RetryableError, match="'owner/name' is no directory here, and the hub did not answer") as caught:
        bring("owner/name", "805090d", kind, tmp_path)
    assert "or set the source to a local directory or an s3:// mirror" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "revision"), [("owner/other", None), ("owner/model", "v2"), ("owner/model", "0" * 40)]
)
def test_what_the_hub_does_not_have_is_not_tried_again(
    name: str, revision: str | None, hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.commit("models/owner/model", model)
    with pytest.raises(SettingsError, match=f"the hub has no model '{name}' at revision '{revision or 'main'}'"):
        bring(name, revision, "model", tmp_path)


def test_a_branch_is_resolved_to_a_commit_and_a_commit_needs_no_look(hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.commit("models/owner/model", model)
    for revision in (None, "main", commit[:7]):
        assert sources.find("owner/model", revision, "model").revision == commit
    assert len(hub.requests) == 3
    pinned = sources.find("owner/model", commit, "model")
    assert len(hub.requests) == 3
    assert pinned.identity == sources.find("owner/model", "main", "model").identity
    hub.requests.clear()
    directory = sources.bring(pinned, tmp_path)
    assert sorted(hub.downloads) == sorted(path.name for path in directory.iterdir())
    assert "pytorch_model.bin" not in hub.downloads  # no pickle ever


def test_a_mirror_of_the_hub_knows_its_commit_and_says_the_same_as_the_hub(
    hub: Hub, bucket: Store, model: Path, tmp_path: Path
) -> None:
    commit = hub.commit("models/owner/model", model)
    uri = f"s3://{bucket.bucket}/of-the-hub"
    assert main(["mirror", "owner/model", "--revision", "main", "--kind", "model", "--to", uri]) == 0
    found = sources.find(uri, commit, "model")
    assert found.revision == commit
    assert files_in(sources.bring(found, tmp_path)) == files_in(bring("owner/model", "main", "model", tmp_path))


README = """---
configs:
- config_name: en-es
  data_files:
  - split: train
    path: en-es/train-*
  - split: test
    path: en-es/test.parquet
- config_name: en-fr
  data_files: "**/fr-*.parquet"
---
"""


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A dataset of more than one pair."""
    directory = tmp_path / "pairs"
    for name in (
        "en-es/train-0.parquet",
        "en-es/train-1.parquet",
        "en-es/test.parquet",
        "fr/fr-0.parquet",
        "README.md",
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(README if name == "README.md" else name)
    return directory


@pytest.mark.parametrize("place", ["hub", "mirror"])
@pytest.mark.parametrize(
    ("config", "files"),
    [
        ("en-es", {"en-es/train-0.parquet", "en-es/train-1.parquet", "en-es/test.parquet"}),
        ("en-fr", {"fr/fr-0.parquet"}),
        ("en-de", set()),
        (None, {"en-es/train-0.parquet", "en-es/train-1.parquet", "en-es/test.parquet", "fr/fr-0.parquet"}),
    ],
)
def test_of_a_dataset_only_the_pairs_own_files_are_fetched(
    place: str, config: str | None, files: set[str], *, hub: Hub, bucket: Store, pairs: Path, tmp_path: Path
) -> None:
    hub.commit("datasets/owner/pairs", pairs)
    source = "owner/pairs"
    if place == "mirror":
        source = f"s3://{bucket.bucket}/pairs"
        sources.mirror("owner/pairs", None, "dataset", source)
    directory = sources.bring(sources.find(source, None, "dataset"), tmp_path / "scratch", config)
    assert set(files_in(directory)) == {*files, "README.md"}


@pytest.mark.parametrize("readme", [None, "no more than text", "---\nconfigs: 3\n---\n", "---\n: [\n---\n"])
def test_a_dataset_that_does_not_say_which_files_are_whose_is_fetched_whole(
    readme: str | None, bucket: Store, pairs: Path, tmp_path: Path
) -> None:
    (pairs / "README.md").unlink()
    if readme:
        (pairs / "README.md").write_text(readme)
    uri = f"s3://{bucket.bucket}/whole"
    sources.mirror(str(pairs), None, "dataset", uri)
    found = sources.bring(sources.find(uri, None, "dataset"), tmp_path / "scratch", "en-es")
    assert len([*found.rglob("*.parquet")]) == 4


def test_a_mirror_that_is_replaced_meanwhile_is_worth_another_try(bucket: Store, model: Path, tmp_path: Path) -> None:
    uri = f"s3://{bucket.bucket}/replaced"
    sources.mirror(str(model), None, "model", uri)
    found = sources.find(uri, None, "model")
    (model / "config.json").write_text("another")
    sources.mirror(str(model), None, "model", uri)
    assert sources.find(uri, None, "model").identity != found.identity
    with pytest.raises(RetryableError, match="was replaced while it was being read: try again"):
        sources.bring(found, tmp_path / "scratch")
