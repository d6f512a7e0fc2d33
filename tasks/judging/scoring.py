"""How translations are scored: sacrebleu's metrics from per-sentence statistics, and resampling of those.

Statistics are counts, a row a sentence, whose sum over any set of sentences gives the set's score. So a score, its
confidence interval and a paired comparison are all made of the same rows, without translating or counting again.

Sources: Papineni et al. 2002 (BLEU); Popović 2017 (chrF++); Post 2018 (sacrebleu and its signatures); Koehn 2004
(paired bootstrap); Riezler and Maxwell 2005 (approximate randomisation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

ORDERS = 4  # BLEU counts n-grams of one to four words
# One sentence's statistics, a row: matched n-grams of each order, n-grams of each order, words, reference words.
STATISTICS = 2 * ORDERS + 2
CHRF_PLUS_PLUS = CHRF(word_order=2)
Score = Callable[[np.ndarray], float]  # of summed statistics


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


def chrf_of_total(total: np.ndarray) -> float:
    """chrF++ (0 to 100) of summed statistics, by sacrebleu's own formula."""
    return float(CHRF_PLUS_PLUS._compute_f_score(total.tolist()))


def mean_of_total(total: np.ndarray) -> float:
    """The mean of what was summed in the first of two columns and counted in the second: a loss per token."""
    return float(total[0] / total[1])


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
    sentences, scores = len(rows), np.empty(samples)
    for sample in range(samples):
        times_drawn = np.bincount(random.integers(sentences, size=sentences), minlength=sentences)
        scores[sample] = score(times_drawn @ rows)
    return scores


def bootstrap_gains(candidate: np.ndarray, champion: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """BLEU differences, candidate minus champion, on redrawn test sets: (samples,)."""
    return bootstrap(candidate, bleu_of_total, samples, seed) - bootstrap(champion, bleu_of_total, samples, seed)


def chance_of_gain(candidate: np.ndarray, champion: np.ndarray, samples: int, seed: int = 0) -> float:
    """How likely a BLEU gain as large as the observed one is between systems that are the same (one-sided p-value).

    Approximate randomisation: were the two the same, each sentence's translations could as well change places.
    """
    random = np.random.default_rng(seed)
    surplus = (candidate - champion).astype(float)
    first, second = candidate.sum(axis=0).astype(float), champion.sum(axis=0).astype(float)
    observed = bleu_of_total(first) - bleu_of_total(second)
    as_large = 0
    for _ in range(samples):
        moved = random.integers(2, size=len(surplus)) @ surplus
        as_large += bleu_of_total(first - moved) - bleu_of_total(second + moved) >= observed
    return (1 + as_large) / (1 + samples)
