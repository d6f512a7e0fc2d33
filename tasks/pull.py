"""pull: bring the corpus and the base model into the store, under their content's fingerprint.

    python -m tasks pull --run s3://retrain/runs/RUN_ID

Reads    the hub, a local directory or an s3:// mirror; the production model's manifest
Writes   datasets/NAME/PAIR/FINGERPRINT/{train,validation,test}.parquet    columns: source, target (text)
         datasets/NAME/PAIR/FINGERPRINT/dataset.json                       rows, revision; written last
         base-models/NAME/FINGERPRINT/...                                  a from_pretrained directory
         {datasets/NAME/PAIR,base-models/NAME}/sources/HASH.json           which of them a source has become
Result   the two keys, the hub's commits, and `changed`: whether anything differs from what production was trained on

A source is looked at before it is fetched (its commit, its mirror's manifest, its files' hashes); one that has been
pulled before costs that look.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from tasks import artifacts, registry
from tasks.data import sources
from tasks.errors import DataError
from tasks.run import Run
from tasks.settings import BaseModelSource, Data, Settings
from tasks.storage import MissingObjectError, Store, to_json

log = logging.getLogger(__name__)
disable_progress_bars()

SPLITS = ("train", "validation", "test")
DATASET_MANIFEST = "dataset.json"
SCHEMA = pa.schema([("source", pa.string()), ("target", pa.string())])
ROWS_AT_ONCE = 10_000


class Pulled(NamedTuple):
    """An artifact in the store, the commit of the hub that it was made from, and what its manifest says."""

    key: str
    revision: str | None
    about: dict[str, Any]


def run(run: Run) -> dict[str, Any]:
    """Pull both; what is in the store already is not fetched again. Raises `DataError` for an unusable corpus."""
    settings = run.settings
    with tempfile.TemporaryDirectory() as scratch:
        dataset = pull_dataset(run.store, settings.data, Path(scratch))
        base_model = pull_base_model(run.store, settings.base_model, Path(scratch))
    inputs = fingerprint_inputs(settings, dataset.key, base_model.key)
    champion = registry.champion_of(run.store, settings.name, run.id)
    before = registry.manifest(run.store, settings.name, champion).metadata["lineage"]["inputs"] if champion else None
    changed = settings.force or inputs != before
    what = "training goes on" if changed else "nothing has changed since production: the run ends here"
    rows = dataset.about["rows"]
    return {
        "summary": f"{sum(rows.values()):,} pairs in {dataset.key}; {what}",
        "dataset": dataset.key,
        "base_model": base_model.key,
        "revisions": {"dataset": dataset.revision, "base_model": base_model.revision},
        "rows": rows,
        "inputs": inputs,
        "changed": changed,
    }


def pull_dataset(store: Store, data: Data, scratch: Path) -> Pulled:
    """Put the corpus in the store, under the fingerprint of its rows."""
    source = sources.find(data.source, data.revision, "dataset")

    def make() -> tuple[str, Path, dict[str, Any]]:
        directory = sources.bring(source, scratch, data.configuration)
        splits = read_splits(data, directory, scratch / "cache")
        files = scratch / "parquet"
        files.mkdir()
        digests, rows = hashlib.sha256(), {}
        for split in SPLITS:
            split_digest = write_split(splits[split], data, split, files / f"{split}.parquet")
            digests.update(f"{split} {split_digest}\n".encode())
            rows[split] = splits[split].num_rows
        return digests.hexdigest(), files, {"pair": data.pair, "rows": rows}

    limits = {"train": data.max_train_rows, "evaluation": data.max_eval_rows}
    return once(store, f"datasets/{data.name}/{data.pair}", source, make, manifest=DATASET_MANIFEST, limits=limits)


def pull_base_model(store: Store, model: BaseModelSource, scratch: Path) -> Pulled:
    """Put the base model in the store, under the fingerprint of its files."""
    source = sources.find(model.source, model.revision, "model")

    def make() -> tuple[str, Path, dict[str, Any]]:
        files = scratch / "base-model"
        sources.copy_files(sources.bring(source, scratch), "model", files)
        return artifacts.describe(files).fingerprint, files, {}

    return once(store, f"base-models/{model.name}", source, make)


def once(
    store: Store,
    place: str,
    source: sources.Source,
    make: Callable[[], tuple[str, Path, dict[str, Any]]],
    *,
    manifest: str = artifacts.MANIFEST,
    limits: dict[str, int | None] | None = None,
) -> Pulled:
    """The artifact below `place` that `make` makes of a source: its fingerprint, its files and what to say of them.

    PLACE/sources/HASH.json remembers which one it was, so that the same source is not fetched a second time.
    """
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    identity = to_json({"code": code, "source": source.identity, "limits": limits})
    record = f"{place}/sources/{hashlib.sha256(identity).hexdigest()[:32]}.json"
    try:
        key = f"{place}/{store.get_json(record)['fingerprint']}"
        about = artifacts.read_manifest(store, key, manifest_name=manifest).metadata
        log.info("%s is in the store already: %s", source.place, key)
        return Pulled(key, source.revision, about)
    except (MissingObjectError, ValueError, KeyError, TypeError):
        pass  # not seen before, or what it names is not, or no longer, complete
    digest, files, about = make()
    fingerprint = digest[:32]
    key = f"{place}/{fingerprint}"
    from_ = {"source": source.place, "revision": source.revision}
    if store.exists(f"{key}/{manifest}"):
        log.info("%s is in the store already", key)
    else:
        artifacts.publish(store, key, files, {**from_, **about}, manifest_name=manifest)
    store.put_json(record, {**from_, "fingerprint": fingerprint})
    return Pulled(key, source.revision, about)


def read_splits(data: Data, directory: Path, cache: Path) -> DatasetDict:
    """The corpus's three splits, sampled down to the settings' limits; each row has `translation: {en, es}`.

    Raises `DataError` naming the language pair, split or column that is not as it must be.
    """
    config = data.configuration
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
