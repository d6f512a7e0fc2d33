"""How translations are scored: sacrebleu's metrics, per-sentence statistics to recompute them, and paired resampling.

Sources: Papineni et al. 2002 (BLEU); Popović 2017 (chrF++); Post 2018 (sacrebleu and its signatures); Koehn 2004
(paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

ORDERS = 4  # BLEU counts n-grams of one to four words
# One sentence's statistics, a row: matched n-grams of each order, n-grams of each order, words, reference words.
STATISTICS = 2 * ORDERS + 2


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Each sentence's BLEU statistics: int array (sentences, STATISTICS). Their sum gives the corpus's BLEU."""
    bleu = BLEU(effective_order=True)
    rows = np.zeros((len(hypotheses), STATISTICS), np.int64)
    for row, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True)):
        score = bleu.sentence_score(hypothesis, [reference])
        rows[row] = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    return rows


def bleu_from(statistics: np.ndarray) -> float:
    """Corpus BLEU (0 to 100) of sentences' statistics, by sacrebleu's own formula."""
    return _bleu(statistics.sum(axis=0))


def _bleu(total: np.ndarray) -> float:
    score = BLEU.compute_bleu(
        correct=total[:ORDERS].tolist(),
        total=total[ORDERS : 2 * ORDERS].tolist(),
        sys_len=int(total[-2]),
        ref_len=int(total[-1]),
        smooth_method="exp",
    )
    return float(score.score)


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Corpus BLEU and chrF++, each with its `score` (0 to 100) and the `signature` that makes it reproducible."""
    scores = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF(word_order=2))):
        score = metric.corpus_score(list(hypotheses), [list(references)])
        scores[name] = {"score": float(score.score), "signature": str(metric.get_signature())}
    return scores


def bootstrap_gains(candidate: np.ndarray, champion: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """BLEU differences, candidate minus champion, on test sets redrawn with replacement: (samples,).

    Both systems are scored on the same redrawn sentences, which is what makes the comparison paired.
    """
    random = np.random.default_rng(seed)
    sentences = len(candidate)
    both = np.hstack([candidate, champion]).astype(float)  # floats multiply fast, and are exact for counts
    gains = np.empty(samples)
    for sample in range(samples):
        times_drawn = np.bincount(random.integers(sentences, size=sentences), minlength=sentences)
        totals = times_drawn @ both
        gains[sample] = _bleu(totals[:STATISTICS]) - _bleu(totals[STATISTICS:])
    return gains
