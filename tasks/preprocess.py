"""preprocess: turn sentences into token ids.

    python -m tasks preprocess --run s3://retrain/runs/RUN_ID

Reads    datasets/NAME/PAIR/FINGERPRINT/*.parquet, runs/RUN_ID/validation/quarantine.parquet, the base model's tokenizer
Writes   prepared/FINGERPRINT/{train,validation,test}.arrow   source, target (text), input_ids, labels (unpadded)
         prepared/FINGERPRINT/tokenizer/                      the base model's tokenizer and the characters that it
                                                              lacked (see `tasks.data.tokenizer`)
         prepared/FINGERPRINT/manifest.json
Result   the key, how many sequences were truncated, which characters were added

The fingerprint is made of everything that the output depends on, so unchanged input costs one look-up. The same input
always gives the same bytes, whatever the number of processes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from tasks import artifacts
from tasks.data.encoding import SCHEMA, Encoder, encode
from tasks.data.parallel import in_order, processes_for
from tasks.data.prepared import TOKENIZER
from tasks.data.tokenizer import extend, fetch_tokenizer, load_tokenizer
from tasks.pull import DATASET_MANIFEST, SPLITS
from tasks.run import Run
from tasks.settings import Preprocessing
from tasks.storage import MissingObjectError, to_json

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 5_000
CODE = (
    "preprocess.py",
    "data/encoding.py",
    "data/prepared.py",
    "data/text.py",
    "data/tokenizer.py",
)  # what decides the output besides its inputs


def run(run: Run) -> dict[str, Any]:
    """Tokenise the usable pairs of every split, unless the very same has been done before."""
    settings, pulled = run.settings.preprocessing, run.result("pull")
    characters = run.result("validate")["characters"]["added"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run.store.download(run.key("validation", "quarantine.parquet"), scratch / "quarantine.parquet")
        aside = rows_set_aside(scratch / "quarantine.parquet")
        inputs = {
            "code": code_fingerprint(),
            "dataset": pulled["dataset"],
            "quarantined": {split: hashlib.sha256(rows.tobytes()).hexdigest() for split, rows in aside.items()},
            "tokenizer": pulled["base_model"],
            "characters": characters,
            "settings": settings.model_dump(),
        }
        key = f"prepared/{hashlib.sha256(to_json(inputs)).hexdigest()[:32]}"
        try:
            about = artifacts.read_manifest(run.store, key).metadata
            log.info("%s is in the store already", key)
        except MissingObjectError:
            prepared = scratch / "prepared"
            extend(fetch_tokenizer(run.store, pulled["base_model"], scratch), characters, prepared / TOKENIZER)
            tokenizer = load_tokenizer(prepared / TOKENIZER).backend_tokenizer
            artifacts.fetch(run.store, pulled["dataset"], scratch / "data", manifest_name=DATASET_MANIFEST)
            about = {"characters": "".join(characters), "rows": {}, "truncated": {}}
            for split in SPLITS:
                texts, output = scratch / "data" / f"{split}.parquet", prepared / f"{split}.arrow"
                counts = prepare(texts, aside[split], output, tokenizer=tokenizer, settings=settings)
                about["rows"][split], about["truncated"][split] = counts
            artifacts.publish(run.store, key, prepared, about)
    rows, cut = sum(about["rows"].values()), sum(about["truncated"].values())
    summary = f"{rows:,} pairs in {key}, {cut:,} truncated, {len(characters)} characters added to the tokenizer"
    return {"summary": summary, "prepared": key, **about}


def rows_set_aside(quarantine: Path) -> dict[str, np.ndarray]:
    """The rows that validation has set aside, in order, of each split."""
    table = pq.read_table(quarantine, columns=["split", "row"])
    splits, rows = table["split"].to_numpy(), table["row"].to_numpy()
    return {split: np.sort(rows[splits == split]) for split in SPLITS}


def code_fingerprint() -> str:
    """What the code is that makes prepared data: this module's and its helpers' text, and the tokenizer library."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for name in CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def prepare(
    texts: Path,
    aside: np.ndarray,
    output: Path,
    *,
    tokenizer: tokenizers.Tokenizer,
    settings: Preprocessing,
    processes: int | None = None,
) -> tuple[int, int]:
    """Write a split's token ids as an Arrow file; returns the number of its pairs, and how many were truncated."""
    encoder = Encoder(tokenizer)
    function = functools.partial(encode, encoder=encoder, prompt=settings.prompt, max_tokens=settings.max_tokens)
    processes = processes or processes_for(pq.ParquetFile(texts).metadata.num_rows)
    rows = truncated = 0
    with pa.OSFile(str(output), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in in_order(function, usable(texts, aside), processes):
            writer.write_batch(batch.select(SCHEMA.names))
            rows += batch.num_rows
            truncated += batch["truncated"].true_count
    return rows, truncated


def usable(texts: Path, aside: np.ndarray) -> Iterator[pa.RecordBatch]:
    """A split's rows without those set aside, some thousands at once."""
    first = 0
    for batch in pq.ParquetFile(texts).iter_batches(ROWS_AT_ONCE):
        rows = np.arange(first, first + batch.num_rows)
        yield batch.filter(pa.array(~np.isin(rows, aside, assume_unique=True)))
        first += batch.num_rows
