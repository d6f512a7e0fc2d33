"""How far a corpus is from the one that production was trained on, without knowing what either is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp

from tasks.data.rules import likeliest_language
from tasks.data.text import normalise

SAMPLE = 20_000  # pairs, spread over the split
SIDES = ("source", "target")
MEASURES = ("rows", "lengths", "languages", "trigrams")


@dataclass(frozen=True)
class Profile:
    """What a split is like: its rows, and over both sides of a sample the lengths, languages and character trigrams."""

    rows: int
    lengths: dict[str, list[int]]
    languages: dict[str, Counter[str]]
    trigrams: dict[str, Counter[str]]


def profile(path: Path) -> Profile:
    """Look at a split's parquet file."""
    file = pq.ParquetFile(path)
    rows = file.metadata.num_rows
    step, first = max(1, -(-rows // SAMPLE)), 0
    texts: dict[str, list[str]] = {side: [] for side in SIDES}
    for batch in file.iter_batches(10_000, columns=list(SIDES)):
        chosen = batch.take(np.arange(-first % step, batch.num_rows, step))
        first += batch.num_rows
        for side in SIDES:
            texts[side] += [normalise(text or "") for text in chosen[side].to_pylist()]
    return Profile(
        rows,
        {side: [len(text) for text in texts[side]] for side in SIDES},
        {side: Counter(filter(None, map(likeliest_language, texts[side]))) for side in SIDES},
        {side: Counter(t[i : i + 3] for t in texts[side] for i in range(len(t) - 2)) for side in SIDES},
    )


def distances(now: Profile, before: Profile) -> dict[str, float]:
    """How far one corpus is from the other, the farther side counting; 0 is the same.

    `rows`: by which share of the smaller number the rows have changed. `lengths`: the largest difference between the
    two cumulative distributions (Kolmogorov-Smirnov). `languages`: the share of sentences that would have to change
    theirs. `trigrams`: Jensen-Shannon distance between the frequencies of three characters, to the base of 2. All but
    `rows` are at most 1.
    """
    few, many = sorted((max(1, now.rows), max(1, before.rows)))
    return {
        "rows": many / few - 1,
        "lengths": max(float(ks_2samp(now.lengths[side], before.lengths[side]).statistic) for side in SIDES),
        "languages": max(_total_variation(now.languages[side], before.languages[side]) for side in SIDES),
        "trigrams": max(
            float(jensenshannon(*_aligned(now.trigrams[side], before.trigrams[side]), base=2)) for side in SIDES
        ),
    }


def _total_variation(now: Counter[str], before: Counter[str]) -> float:
    if not now or not before:
        return float(bool(now) != bool(before))
    a, b = _aligned(now, before)
    return float(abs(a / a.sum() - b / b.sum()).sum() / 2)


def _aligned(now: Counter[str], before: Counter[str]) -> tuple[Any, Any]:
    keys: Iterable[str] = sorted(now.keys() | before.keys())
    return np.array([now[key] for key in keys], float), np.array([before[key] for key in keys], float)
