"""preprocess: turn sentences into token ids.

    python -m tasks preprocess --run s3://retrain/runs/RUN_ID

Reads    datasets/NAME/PAIR/FINGERPRINT/*.parquet, runs/RUN_ID/validation/quarantine.parquet, the tokenizer
Writes   prepared/FINGERPRINT/{train,validation,test}/   Arrow: source, target (text), input_ids, labels (unpadded)
         prepared/FINGERPRINT/tokenizer/                 the base model's tokenizer and the characters that it lacked,
                                                         extension.json: their embedding rows (see `tasks.tokenizer`)
         prepared/FINGERPRINT/manifest.json
Result   the key, how many sequences were truncated, how many characters were added

The fingerprint is made of everything that the output depends on, so unchanged input costs one look-up.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict

from tasks import artifacts
from tasks.prepared import TOKENIZER
from tasks.pull import DATASET_MANIFEST, SPLITS
from tasks.run import Run
from tasks.storage import MissingObjectError, to_json
from tasks.tokenizer import extend, fetch_tokenizer, load_tokenizer

log = logging.getLogger(__name__)

FORMAT = 2  # raised when this module makes something else of the same input


def run(run: Run) -> dict[str, Any]:
    """Tokenise the usable pairs of every split, unless the very same has been done before."""
    settings = run.settings.preprocessing
    pulled = run.result("pull")
    characters = run.result("validate")["characters"]["added"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run.store.download(run.key("validation", "quarantine.parquet"), scratch / "quarantine.parquet")
        aside = pd.read_parquet(scratch / "quarantine.parquet")
        inputs = {
            "format": FORMAT,
            "dataset": pulled["dataset"],
            "quarantined": sorted(zip(aside["split"], (int(row) for row in aside["row"]), strict=True)),
            "tokenizer": pulled["base_model"],
            "characters": characters,
            "settings": settings.model_dump(),
        }
        key = f"prepared/{hashlib.sha256(to_json(inputs)).hexdigest()[:32]}"
        try:
            about = artifacts.read_manifest(run.store, key).metadata
            log.info("%s is in the store already", key)
        except MissingObjectError:
            prepared_directory = scratch / "prepared"
            extend(
                fetch_tokenizer(run.store, pulled["base_model"], scratch), characters, prepared_directory / TOKENIZER
            )
            tokenizer = load_tokenizer(prepared_directory / TOKENIZER)
            artifacts.fetch(run.store, pulled["dataset"], scratch / "data", manifest_name=DATASET_MANIFEST)
            prepared = DatasetDict()
            for split in SPLITS:
                texts = pd.read_parquet(scratch / "data" / f"{split}.parquet")
                texts = texts.drop(index=aside.loc[aside["split"] == split, "row"])
                prepared[split] = tokenise(texts, tokenizer, settings.prompt, settings.max_tokens)
            about = {
                "characters": "".join(characters),
                "rows": {split: rows.num_rows for split, rows in prepared.items()},
                "truncated": {split: sum(rows["truncated"][:]) for split, rows in prepared.items()},
            }
            prepared.remove_columns("truncated").save_to_disk(prepared_directory)
            artifacts.publish(run.store, key, prepared_directory, about)
    rows, cut = sum(about["rows"].values()), sum(about["truncated"].values())
    summary = f"{rows:,} pairs in {key}, {cut:,} truncated, {len(characters)} characters added to the tokenizer"
    return {"summary": summary, "prepared": key, **about}


def tokenise(texts: pd.DataFrame, tokenizer: Any, prompt: str, max_tokens: int) -> Dataset:
    """Token ids of pairs, unpadded: `input_ids` (prompt and source), `labels` (target); each ends in the end token."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        inputs = tokenizer([prompt + text for text in batch["source"]], verbose=False)["input_ids"]
        labels = tokenizer(batch["target"], verbose=False)["input_ids"]
        return {
            "truncated": [max(len(i), len(t)) > max_tokens for i, t in zip(inputs, labels, strict=True)],
            "input_ids": [_cut(ids, max_tokens) for ids in inputs],
            "labels": [_cut(ids, max_tokens) for ids in labels],
        }

    rows = Dataset.from_dict({side: [normalise(text) for text in texts[side]] for side in ("source", "target")})
    return rows.map(encode, batched=True)


def normalise(text: str) -> str:
    """The same text, composed (NFC) and with single spaces: what differs only there must not look different."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _cut(ids: list[int], length: int) -> list[int]:
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
