"""How translations are scored: sacrebleu's metrics from per-sentence statistics, and resampling of those.

Statistics are counts, a row a sentence, whose sum over any set of sentences gives the set's score. So a score, its
confidence interval and a paired comparison are all made of the same rows, without translating or counting again.

Sources: Papineni et al. 2002 (BLEU); Popović 2017 (chrF++); Post 2018 (sacrebleu and its signatures); Koehn 2004
(paired bootstrap); Riezler and Maxwell 2005 (approximate randomisation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

ORDERS = 4  # BLEU counts n-grams of one to four words
# One sentence's statistics, a row: matched n-grams of each order, n-grams of each order, words, reference words.
STATISTICS = 2 * ORDERS + 2
CHRF_PLUS_PLUS = CHRF(word_order=2)
Score = Callable[[np.ndarray], np.ndarray]  # of summed statistics, a row a test set: (test sets,)
AT_ONCE = 30_000  # sentences that are drawn at once: they fit in a processor's cache


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Each sentence's BLEU statistics: int array (sentences, STATISTICS). Their sum gives the corpus's BLEU."""
    bleu = BLEU(effective_order=True)
    rows = np.zeros((len(hypotheses), STATISTICS), np.int64)
    for row, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True)):
        score = bleu.sentence_score(hypothesis, [reference])
        rows[row] = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    return rows


def chrf_statistics(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Each sentence's chrF++ statistics: int array (sentences, 24), three counts for each of eight n-gram orders."""
    return np.array(CHRF_PLUS_PLUS._extract_corpus_statistics(list(hypotheses), [list(references)]), np.int64)


def bleu_from(statistics: np.ndarray) -> float:
    """Corpus BLEU (0 to 100) of sentences' statistics, by sacrebleu's own formula."""
    return bleu_of_total(statistics.sum(axis=0))


def bleu_of_total(total: np.ndarray) -> float:
    """BLEU of summed statistics."""
    score = BLEU.compute_bleu(
        correct=total[:ORDERS].tolist(),
        total=total[ORDERS : 2 * ORDERS].tolist(),
        sys_len=int(total[-2]),
        ref_len=int(total[-1]),
        smooth_method="exp",
    )
    return float(score.score)


def bleu_of_totals(totals: np.ndarray) -> np.ndarray:
    """BLEU of summed statistics, a row a test set: what `bleu_of_total` gives, for thousands of them at once."""
    matched, possible = totals[:, :ORDERS], totals[:, ORDERS : 2 * ORDERS]
    smoothed = np.where(matched == 0, 0.5 ** np.cumsum(matched == 0, axis=1), matched)  # exponential smoothing
    defined = np.logical_and(matched.any(axis=1), possible.all(axis=1))
    precisions = np.divide(smoothed, possible, out=np.ones_like(smoothed, float), where=defined[:, None])
    ratio = np.divide(totals[:, -1], totals[:, -2], out=np.ones(len(totals)), where=defined)
    return np.where(defined, 100 * np.exp(np.minimum(0, 1 - ratio) + np.log(precisions).mean(axis=1)), 0.0)


def chrf_of_total(total: np.ndarray) -> float:
    """chrF++ (0 to 100) of summed statistics, by sacrebleu's own formula."""
    return float(CHRF_PLUS_PLUS._compute_f_score(total.tolist()))


def chrf_of_totals(totals: np.ndarray) -> np.ndarray:
    """chrF++ of summed statistics, a row a test set."""
    return np.array([chrf_of_total(total) for total in totals])


def mean_of_totals(totals: np.ndarray) -> np.ndarray:
    """The mean of what was summed in the first of two columns and counted in the second: a loss per token."""
    return totals[:, 0] / totals[:, 1]


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Corpus BLEU and chrF++, each with its `score` (0 to 100) and the `signature` that makes it reproducible."""
    scores = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF(word_order=2))):
        score = metric.corpus_score(list(hypotheses), [list(references)])
        scores[name] = {"score": float(score.score), "signature": str(metric.get_signature())}
    return scores


def bootstrap(statistics: np.ndarray, score: Score, samples: int, seed: int = 0) -> np.ndarray:
    """The score on test sets redrawn with replacement: (samples,).

    The same seed redraws the same sentences, so the differences of two systems' results are a paired comparison.
    """
    random = np.random.default_rng(seed)
    rows = statistics.astype(float)  # floats multiply fast, and are exact for counts
    sentences, totals = len(rows), np.empty((samples, statistics.shape[1]))
    for block in np.array_split(totals, math.ceil(samples * sentences / AT_ONCE)):
        drawn = random.integers(sentences, size=(len(block), sentences)) + sentences * np.arange(len(block))[:, None]
        block[:] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape) @ rows
    return score(totals)


def bootstrap_gains(candidate: np.ndarray, champion: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """BLEU differences, candidate minus champion, on redrawn test sets: (samples,)."""
    return bootstrap(candidate, bleu_of_totals, samples, seed) - bootstrap(champion, bleu_of_totals, samples, seed)


def chance_of_gain(candidate: np.ndarray, champion: np.ndarray, samples: int, seed: int = 0) -> float:
    """How likely a BLEU gain as large as the observed one is between systems that are the same (one-sided p-value).

    Approximate randomisation: were the two the same, each sentence's translations could as well change places.
    """
    random = np.random.default_rng(seed)
    surplus = (candidate - champion).astype(float)
    totals = np.stack([candidate.sum(axis=0), champion.sum(axis=0)]).astype(float)
    observed = -np.diff(bleu_of_totals(totals))
    moved = np.empty((samples, surplus.shape[1]))
    for block in np.array_split(moved, math.ceil(samples * len(surplus) / AT_ONCE)):
        block[:] = random.integers(2, size=(len(block), len(surplus))) @ surplus
    as_large = (bleu_of_totals(totals[0] - moved) - bleu_of_totals(totals[1] + moved) >= observed).sum()
    return float(1 + as_large) / (1 + samples)
