"""Extra test sets are read alike wherever they are, and what is not a set of pairs is refused by row or column."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from tasks import artifacts
from tasks.errors import StepError
from tasks.judging import testsets
from tasks.settings import Data
from tasks.storage import Store

PAIRS = [("My wife has a car.", "Mi esposa tiene un carro."), ('She said "yes".', 'Dijo "sí".')]
TABLE = pd.DataFrame(PAIRS, columns=["source", "reference"])
DATA = Data(source="examples/demo/corpus", pair="en-es")


def read(source: str | Path, scratch: Path) -> pd.DataFrame:
    return testsets.read("talks", str(source), DATA, scratch / "scratch")


def write_dataset(directory: Path, split: str = "test", languages: tuple[str, str] = ("en", "es")) -> Path:
    """A dataset in the hub's layout."""
    (directory / "en-es").mkdir(parents=True)
    rows = Dataset.from_list([{"translation": dict(zip(languages, pair, strict=True))} for pair in PAIRS])
    rows.to_parquet(directory / "en-es" / f"{split}-00000-of-00001.parquet")
    (directory / "README.md").write_text(
        f"---\nconfigs:\n- config_name: en-es\n  data_files:\n  - split: {split}\n    path: en-es/{split}-*\n---\n"
    )
    return directory


@pytest.mark.parametrize("place", ["tsv", "parquet", "s3 tsv", "s3 parquet", "directory", "mirror"])
def test_every_kind_of_source_gives_the_same_pairs(place: str, bucket: Store, tmp_path: Path) -> None:
    tsv, parquet = tmp_path / "talks.tsv", tmp_path / "talks.parquet"
    tsv.write_text("".join(f"{source}\t{reference}\r\n" for source, reference in PAIRS), encoding="utf-8")
    TABLE.set_axis(["en", "es"], axis=1).to_parquet(parquet)
    where: str | Path
    if place.startswith("s3"):
        file = tsv if "tsv" in place else parquet
        bucket.upload(file, f"test-sets/{file.name}")
        where = f"s3://{bucket.bucket}/test-sets/{file.name}"
    elif place == "mirror":
        artifacts.publish(bucket, "mirrors/talks", write_dataset(tmp_path / "corpus"))
        where = f"s3://{bucket.bucket}/mirrors/talks"
    else:
        where = write_dataset(tmp_path / "corpus") if place == "directory" else tsv if place == "tsv" else parquet
    pd.testing.assert_frame_equal(read(where, tmp_path), TABLE)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.tsv", b"", "has no sentences"),
        ("one.tsv", b"a\tb\nonly one\n", "row 2 of one.tsv has 1 columns"),
        ("blank.tsv", b"a\tb\nc\t \n", "row 2 of "),
        ("latin.tsv", "a\tsí\n".encode("latin-1"), "is not UTF-8 text"),
        ("text.parquet", b"a\tb\n", "is not parquet"),
        ("gone.tsv", None, "there is no file"),
        ("s3://BUCKET/nothing.tsv", None, "nothing.tsv"),
    ],
)
def test_what_is_not_a_set_of_pairs_is_refused_by_name(
    name: str, content: bytes | None, reason: str, bucket: Store, tmp_path: Path
) -> None:
    source = name.replace("BUCKET", bucket.bucket) if name.startswith("s3") else str(tmp_path / name)
    if content is not None:
        Path(source).write_bytes(content)
    with pytest.raises(StepError, match=r"evaluation\.extra_sets\.talks: ") as refusal:
        read(source, tmp_path)
    assert reason in str(refusal.value)


def test_a_table_or_a_dataset_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talks.parquet"
    TABLE.assign(more=1).to_parquet(path)
    with pytest.raises(StepError, match=r"has 3 columns, expected source and reference"):
        read(path, tmp_path)
    TABLE.assign(reference=[None, "b"]).to_parquet(path)
    with pytest.raises(StepError, match=r"row 1 of .* needs a source and a reference"):
        read(path, tmp_path)
    with pytest.raises(StepError, match="has no usable test split of en-es"):
        read(write_dataset(tmp_path / "training", split="train"), tmp_path)
    with pytest.raises(StepError, match="has no usable test split of en-es"):
        read(write_dataset(tmp_path / "french", languages=("en", "fr")), tmp_path)
