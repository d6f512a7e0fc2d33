"""Extra test sets, on which candidate and champion are scored besides the corpus's own test split.

A source is a file of two columns, source and reference (`.tsv` without a header, or `.parquet`), here or at an s3://
address; or, as for `data.source`, a dataset in the hub's layout with a test split: a hub name, a directory, a mirror.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from tasks.data import sources
from tasks.errors import DataError, SettingsError
from tasks.settings import Data
from tasks.storage import MissingObjectError, split_uri

COLUMNS = ["source", "reference"]


def read(name: str, source: str, data: Data, scratch: Path) -> pd.DataFrame:
    """The set's sentences, columns `source` and `reference`.

    Raises `SettingsError` for a source that does not exist, `DataError` naming the row that is not a pair of texts.
    """
    setting = f"evaluation.extra_sets.{name}"
    kind = Path(source).suffix
    if kind not in {".tsv", ".parquet"}:
        table = read_dataset(setting, source, data, scratch / name)
    else:
        path = Path(source)
        if source.startswith("s3://"):
            store, key = split_uri(source)
            path = scratch / f"{name}{kind}"
            try:
                store.download(key, path)
            except MissingObjectError as error:
                raise SettingsError(f"{setting}: {error}") from error
        elif not path.is_file():
            raise SettingsError(f"{setting}: there is no file {source}")
        table = read_tsv(setting, path) if kind == ".tsv" else read_parquet(setting, path)
    if table.empty:
        raise DataError(f"{setting}: {source} has no sentences")
    for row, pair in enumerate(table.to_numpy().tolist(), start=1):
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise DataError(f"{setting}: row {row} of {source} needs a source and a reference, found {pair}")
    return table


def read_tsv(setting: str, path: Path) -> pd.DataFrame:
    """Lines of two texts with a tab between them. Quotation marks are text like any other."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{setting}: {path.name} is not UTF-8 text ({error})") from error
    pairs = [line.rstrip("\r").split("\t") for line in (lines[:-1] if lines[-1] == "" else lines)]
    for row, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise DataError(f"{setting}: row {row} of {path.name} has {len(pair)} columns, expected two: {pair}")
    return pd.DataFrame(pairs, columns=COLUMNS)


def read_parquet(setting: str, path: Path) -> pd.DataFrame:
    """The first column as source, the second as reference."""
    try:
        table = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{setting}: {path.name} is not parquet ({error})") from error
    if len(table.columns) != 2:
        raise DataError(f"{setting}: {path.name} has {len(table.columns)} columns, expected source and reference")
    return table.set_axis(COLUMNS, axis=1)


def read_dataset(setting: str, source: str, data: Data, scratch: Path) -> pd.DataFrame:
    """The test split of a dataset in the hub's layout."""
    config = data.configuration
    directory = sources.bring(sources.find(source, None, "dataset"), scratch, config)
    try:
        rows = load_dataset(str(directory), config, split="test", cache_dir=str(scratch / "cache"))
        pairs = [[pair[language] for language in data.languages] for pair in rows["translation"]]
    except (ValueError, KeyError, TypeError, DatasetNotFoundError, DatasetGenerationError, pa.ArrowInvalid) as error:
        raise DataError(f"{setting}: {source} has no usable test split of {config}: {error}") from error
    return pd.DataFrame(pairs, columns=COLUMNS)
