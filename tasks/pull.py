"""pull: bring the corpus and the base model into the store, under their content's fingerprint.

    python -m tasks pull --run s3://retrain/runs/RUN_ID

Reads    the hub, a local directory or an s3:// mirror; the production model's manifest
Writes   datasets/NAME/PAIR/FINGERPRINT/{train,validation,test}.parquet    columns: source, target (text)
         datasets/NAME/PAIR/FINGERPRINT/dataset.json                       rows, revision; written last
         base-models/NAME/FINGERPRINT/...                                  a from_pretrained directory
Result   the two keys, and `changed`: whether anything differs from what production was trained on
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from tasks import artifacts, registry
from tasks.data import sources
from tasks.errors import DataError
from tasks.run import Run
from tasks.settings import Data, Settings
from tasks.storage import MissingObjectError, Store, to_json

log = logging.getLogger(__name__)
disable_progress_bars()

SPLITS = ("train", "validation", "test")
DATASET_MANIFEST = "dataset.json"
SCHEMA = pa.schema([("source", pa.string()), ("target", pa.string())])
ROWS_AT_ONCE = 10_000


def run(run: Run) -> dict[str, Any]:
    """Pull both; what is in the store already is not written again. Raises `DataError` for an unusable corpus."""
    settings = run.settings
    with tempfile.TemporaryDirectory() as scratch:
        dataset, rows = pull_dataset(run.store, settings.data, Path(scratch))
        base_model = pull_base_model(run.store, settings, Path(scratch))
    inputs = fingerprint_inputs(settings, dataset, base_model)
    champion = registry.champion_of(run.store, settings.name, run.id)
    before = registry.manifest(run.store, settings.name, champion).metadata["lineage"]["inputs"] if champion else None
    changed = settings.force or inputs != before
    what = "training goes on" if changed else "nothing has changed since production: the run ends here"
    return {
        "summary": f"{sum(rows.values()):,} pairs in {dataset}; {what}",
        "dataset": dataset,
        "base_model": base_model,
        "rows": rows,
        "inputs": inputs,
        "changed": changed,
    }


def pull_dataset(store: Store, data: Data, scratch: Path) -> tuple[str, dict[str, int]]:
    """Put the corpus in the store and return its key and the rows of each split."""
    source = sources.bring(data.source, data.revision, "dataset", scratch)
    splits = read_splits(data, source.directory, scratch / "cache")
    files = scratch / "parquet"
    files.mkdir()
    digests, rows = hashlib.sha256(), {}
    for split in SPLITS:
        split_digest = write_split(splits[split], data, split, files / f"{split}.parquet")
        digests.update(f"{split} {split_digest}\n".encode())
        rows[split] = splits[split].num_rows
    fingerprint = digests.hexdigest()[:32]
    key = f"datasets/{data.name}/{data.pair}/{fingerprint}"
    if store.exists(f"{key}/{DATASET_MANIFEST}"):
        log.info("%s is in the store already", key)
    else:
        about = {"source": data.source, "revision": source.revision, "pair": data.pair, "rows": rows}
        artifacts.publish(store, key, files, about, manifest_name=DATASET_MANIFEST)
    return key, rows


def read_splits(data: Data, directory: Path, cache: Path) -> DatasetDict:
    """The corpus's three splits, sampled down to the settings' limits; each row has `translation: {en, es}`.

    Raises `DataError` naming the language pair, split or column that is not as it must be.
    """
    config = "-".join(sorted(data.languages))  # the hub names a pair by its languages in alphabetical order
    try:
        # The batch size is given because the default is a file's first row group, which an empty file lacks.
        found = load_dataset(str(directory), config, cache_dir=str(cache), batch_size=ROWS_AT_ONCE)
    except (ValueError, DatasetNotFoundError, FileNotFoundError) as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{data.source} {config}: a split is empty: {error}") from error
        raise DataError(f"data.pair: {data.source} has no usable pair {config!r}: {error}") from error
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{data.source}: a parquet file of {config} cannot be read: {error.__cause__ or error}"
        ) from error
    sampled = DatasetDict()
    for split in SPLITS:
        if split not in found:
            raise DataError(f"{data.source} {config} has no {split} split: found {', '.join(sorted(found))}")
        column = found[split].features.get("translation")
        named = getattr(column, "languages", column)  # the hub's own type, or a plain struct
        if not isinstance(named, (list, dict)) or not set(data.languages) <= set(named):
            raise DataError(
                f"{data.source} {config}: the {split} split needs a column 'translation' with "
                f"{' and '.join(data.languages)}, found {found[split].features}"
            )
        limit = data.max_train_rows if split == "train" else data.max_eval_rows
        sampled[split] = sample(found[split], limit)
    return sampled


def sample(rows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows, spread over the whole and always the same, in their order: corpora are sorted by origin."""
    if limit is None or limit >= rows.num_rows:
        return rows
    chosen = np.random.default_rng(0).choice(rows.num_rows, limit, replace=False)
    return rows.select(np.sort(chosen))


def write_split(rows: Dataset, data: Data, split: str, path: Path) -> str:
    """Write a split as parquet and return a digest of its rows that does not depend on their order."""
    digests: list[bytes] = []
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for sources_, targets in text_batches(rows, data):
            writer.write_table(pa.table({"source": sources_, "target": targets}, SCHEMA))
            digests.extend(row_digest(s, t) for s, t in zip(sources_, targets, strict=True))
    log.info("%s: %s pairs", split, f"{len(digests):,}")
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def text_batches(rows: Dataset, data: Data) -> Iterator[tuple[list[str | None], list[str | None]]]:
    """Source and target sentences, some thousands at once."""
    source, target = data.languages
    for batch in rows.iter(ROWS_AT_ONCE):
        pairs = [pair or {} for pair in batch["translation"]]
        yield [pair.get(source) for pair in pairs], [pair.get(target) for pair in pairs]


def row_digest(source: str | None, target: str | None) -> bytes:
    """16 bytes that tell one pair from every other; lengths are part of it, so that no two pairs run together."""
    digest = hashlib.blake2b(digest_size=16)
    for text in (source, target):
        encoded = b"" if text is None else text.encode("utf-8", "surrogatepass")
        digest.update((b"-" if text is None else str(len(encoded)).encode()) + b":" + encoded)
    return digest.digest()


def pull_base_model(store: Store, settings: Settings, scratch: Path) -> str:
    """Put the base model in the store, under the fingerprint of its files, and return its key."""
    model = settings.base_model
    source = sources.bring(model.source, model.revision, "model", scratch)
    files = scratch / "base-model"
    sources.copy_files(source.directory, "model", files)
    key = f"base-models/{model.name}/{artifacts.describe(files).fingerprint[:32]}"
    try:
        artifacts.read_manifest(store, key)
        log.info("%s is in the store already", key)
    except MissingObjectError:
        artifacts.publish(store, key, files, {"source": model.source, "revision": source.revision})
    return key


def fingerprint_inputs(settings: Settings, dataset: str, base_model: str) -> str:
    """One hash of everything that decides what training will produce: data, base model, and the settings it reads."""
    inputs = {
        "dataset": dataset.rsplit("/", 1)[-1],
        "base_model": base_model.rsplit("/", 1)[-1],
        "pair": settings.data.pair,
        **settings.model_dump(mode="json", include={"validation", "preprocessing"}),
        "training": settings.training.decisive,
    }
    return hashlib.sha256(to_json(inputs)).hexdigest()
