"""What is said of candidate and champion, computed from their translations and losses alone: no model is needed.

evaluate writes these numbers, the gate computes them again before it believes them, and `evaluate --recompute` after a
change of their definition. Two tables hold all that they are made of, a row a sentence:

    translations   set ("test", or an extra test set's name), source, reference; and of each system SYSTEM: the
                   translation, SYSTEM_tokens (its length), SYSTEM_unknown (tokens that stand for no text),
                   SYSTEM_statistics (BLEU)
    losses         split ("validation", "test"), comparable (both systems' tokenizers write the reference alike); and of
                   each system: SYSTEM_loss (nats, summed over the reference's tokens), SYSTEM_tokens
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from tasks.judging.scoring import (
    Score,
    bleu_from,
    bleu_of_totals,
    bleu_statistics,
    bootstrap,
    chance_of_gain,
    chrf_of_totals,
    chrf_statistics,
    corpus_scores,
    mean_of_totals,
)
from tasks.settings import Gate

SYSTEMS = ("champion", "candidate")
TEST = "test"  # the name of the corpus's own test split among the test sets
MIN_SLICE = 50  # fewer sentences say nothing about a slice


def measure(translations: pd.DataFrame, losses: pd.DataFrame, gate: Gate) -> dict[str, Any]:
    """Every number about the two systems; one that cannot be had (a loss that is NaN) is None.

    `champion` and `candidate` each have `bleu` and `chrf` (`score`, `signature`, and `low` to `high`, the confidence
    interval), `validation_loss` and `test_loss` per target token, and what averages hide. `gain` is the paired
    difference of each score, candidate minus champion, with its interval.
    """
    test = translations[translations["set"] == TEST].reset_index(drop=True)
    names = [name for name in translations["set"].unique() if name != TEST]
    metrics = compare(test, gate)
    for system in SYSTEMS:
        for split in ("validation", TEST):
            metrics[system][f"{split}_loss"] = finite(mean_loss(losses[losses["split"] == split], system))
    shared = losses[losses["comparable"] & (losses["split"] == "validation")]
    metrics["gain"]["validation_loss"] = interval(
        *(shared[[f"{system}_loss", f"{system}_tokens"]].to_numpy(float) for system in reversed(SYSTEMS)),
        score=mean_of_totals,
        gate=gate,
    )
    metrics["comparable"] = float(losses["comparable"].mean())
    metrics["leak"] = leak(losses[losses["comparable"]], gate.confidence)
    metrics["slices"] = slice_scores(counts_of(test), slice_members(test), gate)
    metrics["extra"] = {
        name: compare(translations[translations["set"] == name].reset_index(drop=True), gate) for name in names
    }
    return metrics


def compare(table: pd.DataFrame, gate: Gate) -> dict[str, Any]:
    """Both systems on one test set: its size and fingerprint, scores of each, and their paired differences."""
    result: dict[str, Any] = {"sentences": len(table), "fingerprint": fingerprint(table)}
    counts = counts_of(table)
    characters = {system: chrf_statistics(table[system], table["reference"]) for system in SYSTEMS}
    for system in SYSTEMS:
        result[system] = score(table, system)
        for name, rows, formula in (("bleu", counts, bleu_of_totals), ("chrf", characters, chrf_of_totals)):
            bounds = interval(rows[system], None, score=formula, gate=gate)
            result[system][name] |= {"low": bounds["low"], "high": bounds["high"]}
    result["gain"] = {
        "bleu": interval(counts["candidate"], counts["champion"], score=bleu_of_totals, gate=gate),
        "chrf": interval(characters["candidate"], characters["champion"], score=chrf_of_totals, gate=gate),
    }
    result["chance"] = chance_of_gain(counts["candidate"], counts["champion"], gate.bootstrap_samples)
    return result


def counts_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Each system's BLEU statistics, a row a sentence."""
    return {system: bleu_statistics(table[system], table["reference"]) for system in SYSTEMS}


def score(table: pd.DataFrame, system: str) -> dict[str, Any]:
    """A system's scores over a test set, and what averages hide: lengths, empty, copied and repeating outputs."""
    outputs, references, sources = table[system], table["reference"], table["source"]
    stuck = outputs.map(repeats) & ~references.map(repeats)
    return {
        **corpus_scores(outputs, references),
        "length_ratio": float(outputs.str.len().sum() / max(1, references.str.len().sum())),
        "empty": float((outputs.str.strip() == "").mean()),
        "copied": float((outputs.map(plain) == sources.map(plain)).mean()),
        "repeating": float(stuck.mean()),
        "unknown": float(table[f"{system}_unknown"].sum() / max(1, table[f"{system}_tokens"].sum())),
    }


def plain(text: str) -> str:
    """A text without what does not tell a translation from its source."""
    return " ".join(text.casefold().split())


def repeats(text: str) -> bool:
    """Whether a phrase of one to four words comes four times in a row, as from a decoder that is stuck."""
    words = text.casefold().split()
    for length in range(1, 5):
        run = 0
        for word, before in zip(words[length:], words, strict=False):
            run = run + 1 if word == before else 0
            if run >= 3 * length:
                return True
    return False


SLICES: dict[str, Callable[[str, str], bool]] = {
    "of 1-6 words": lambda source, reference: len(reference.split()) <= 6,
    "of 7-12 words": lambda source, reference: 6 < len(reference.split()) <= 12,
    "of 13-24 words": lambda source, reference: 12 < len(reference.split()) <= 24,
    "of over 24 words": lambda source, reference: len(reference.split()) > 24,
    "with a number": lambda source, reference: bool(re.search(r"\d", source)),
    "with letters beyond a-z": lambda source, reference: any(c.isalpha() and not c.isascii() for c in reference),
}


def slice_members(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which sentences each slice has: bool arrays (sentences,)."""
    pairs = list(zip(table["source"], table["reference"], strict=True))
    return {name: np.array([belongs(*pair) for pair in pairs], bool) for name, belongs in SLICES.items()}


def slice_scores(counts: dict[str, np.ndarray], slices: dict[str, np.ndarray], gate: Gate) -> dict[str, dict[str, Any]]:
    """BLEU on parts of the test split: `sentences`, `champion`, `candidate`, and `low` to `high` of the difference."""
    scores = {}
    for name, members in slices.items():
        if members.sum() >= MIN_SLICE:
            part = {system: counts[system][members] for system in SYSTEMS}
            gain = interval(part["candidate"], part["champion"], score=bleu_of_totals, gate=gate)
            both = {system: bleu_from(part[system]) for system in SYSTEMS}
            scores[name] = {"sentences": int(members.sum()), **both, "low": gain["low"], "high": gain["high"]}
    return scores


def interval(rows: np.ndarray, against: np.ndarray | None, *, score: Score, gate: Gate) -> dict[str, float | None]:
    """A score, or its difference from that of `against`, and between what bounds (`low`, `high`) it surely is.

    Each bound holds with the gate's confidence, so both together with less: 95% where the gate's is 97.5%.
    """
    if not len(rows):
        return {"observed": None, "low": None, "high": None}
    observed, drawn = score(rows.sum(axis=0, keepdims=True))[0], bootstrap(rows, score, gate.bootstrap_samples)
    if against is not None:
        observed -= score(against.sum(axis=0, keepdims=True))[0]
        drawn = drawn - bootstrap(against, score, gate.bootstrap_samples)
    low, high = np.quantile(drawn, [1 - gate.confidence, gate.confidence])
    return {"observed": finite(observed), "low": finite(low), "high": finite(high)}


def mean_loss(losses: pd.DataFrame, system: str) -> float:
    """Cross-entropy per target token, in nats."""
    return losses[f"{system}_loss"].sum(skipna=False) / losses[f"{system}_tokens"].sum()


def leak(losses: pd.DataFrame, confidence: float) -> dict[str, float | None]:
    """How much further the loss fell on the test split than on the validation split, from champion to candidate.

    Both splits are of the same text and neither was trained on, so it is about zero; a candidate that has seen the
    test sentences knows them better than others. In nats per token: `observed`, and `low`, which it surely exceeds.
    """
    fell, variance = {}, 0.0
    for split, rows in losses.groupby("split"):
        change = (rows["champion_loss"] - rows["candidate_loss"]).to_numpy()
        tokens = rows["candidate_tokens"].to_numpy()
        fell[split] = change.sum() / tokens.sum()
        variance += float(np.square(change - fell[split] * tokens).sum()) / tokens.sum() ** 2  # of a ratio estimator
    if len(fell) < 2:
        return {"observed": None, "low": None}
    observed = fell[TEST] - fell["validation"]
    return {
        "observed": finite(observed),
        "low": finite(observed - NormalDist().inv_cdf(confidence) * math.sqrt(variance)),
    }


def fingerprint(table: pd.DataFrame) -> str:
    """What a test set is, whoever translates it."""
    pairs = json.dumps(table[["source", "reference"]].to_numpy().tolist(), ensure_ascii=False)
    return hashlib.sha256(pairs.encode()).hexdigest()


def signatures() -> dict[str, str]:
    """How this version scores: the sacrebleu signature of each metric."""
    return {name: found["signature"] for name, found in corpus_scores(["a"], ["a"]).items()}


def finite(value: float) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if math.isfinite(value) else None


def difference(candidate: float | None, champion: float | None) -> float | None:
    """How far the candidate is above the champion, where both are known."""
    return None if candidate is None or champion is None else candidate - champion
