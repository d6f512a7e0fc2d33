"""Prepared data, as the steps after `preprocess` read it.

prepared/FINGERPRINT/{train,validation,test}/    Arrow: source, target (text), input_ids, labels (unpadded)
prepared/FINGERPRINT/tokenizer/                  the run's tokenizer, with extension.json (see `tasks.data.tokenizer`)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from tasks import artifacts
from tasks.data.tokenizer import EXTENSION
from tasks.pull import SPLITS
from tasks.run import Run

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Prepared:
    """A run's tokenised splits, memory-mapped; its tokenizer's directory; the characters which that has gained.

    `extension` has a row a character: `char`, `id` of its embedding row, `like`, the id of the row it starts from.
    """

    splits: DatasetDict
    tokenizer: Path
    extension: list[dict[str, Any]]


def fetch_prepared(run: Run, scratch: Path) -> Prepared:
    """The run's prepared data, verified, in `scratch`."""
    directory = scratch / "prepared"
    artifacts.fetch(run.store, run.result("preprocess")["prepared"], directory)
    extension = json.loads((directory / TOKENIZER / EXTENSION).read_text(encoding="utf-8"))
    splits = DatasetDict({split: Dataset.from_file(str(directory / f"{split}.arrow")) for split in SPLITS})
    return Prepared(splits, directory / TOKENIZER, extension)
