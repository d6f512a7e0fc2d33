"""Scores are sacrebleu's own, recomputed from sentences' statistics; the bootstrap is paired and repeatable."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from tasks.judging.scoring import (
    STATISTICS,
    bleu_from,
    bleu_of_totals,
    bleu_statistics,
    bootstrap_gains,
    chance_of_gain,
    chrf_of_total,
    chrf_statistics,
    corpus_scores,
)

WORDS = st.lists(st.sampled_from(["el", "la", "casa", "perro", "no", "¿qué?", "3,5", "ñandú", "."]), max_size=12)
CORPORA = st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=10)


@given(CORPORA)
def test_corpus_bleu_is_recomputed_exactly_from_statistics(pairs: list[tuple[list[str], list[str]]]) -> None:
    hypotheses, references = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    statistics = bleu_statistics(hypotheses, references)
    assert statistics.shape == (len(pairs), STATISTICS)
    expected = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert bleu_from(statistics) == pytest.approx(expected, abs=1e-9)
    assert corpus_scores(hypotheses, references)["bleu"]["score"] == pytest.approx(expected, abs=1e-9)


@given(st.lists(CORPORA, min_size=1, max_size=5))
def test_bleu_of_many_test_sets_at_once_is_that_of_each(corpora: list[list[tuple[list[str], list[str]]]]) -> None:
    sets = [bleu_statistics(*zip(*[map(" ".join, pair) for pair in pairs], strict=True)) for pairs in corpora]
    scores = bleu_of_totals(np.stack([statistics.sum(axis=0) for statistics in sets]))
    assert scores == pytest.approx([bleu_from(statistics) for statistics in sets], abs=1e-9)


@given(CORPORA)
def test_corpus_chrf_is_recomputed_exactly_from_statistics(pairs: list[tuple[list[str], list[str]]]) -> None:
    hypotheses, references = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    statistics = chrf_statistics(hypotheses, references)
    assert len(statistics) == len(pairs)
    expected = sacrebleu.corpus_chrf(hypotheses, [references], word_order=2).score
    assert chrf_of_total(statistics.sum(axis=0)) == pytest.approx(expected, abs=1e-9)


def test_scores_say_how_they_were_made() -> None:
    scores = corpus_scores(["La casa es azul."], ["La casa era azul."])
    assert scores["bleu"]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nw:2" in scores["chrf"]["signature"]
    expected = sacrebleu.corpus_chrf(["La casa es azul."], [["La casa era azul."]], word_order=2).score
    assert scores["chrf"]["score"] == pytest.approx(expected)


@pytest.fixture
def systems() -> tuple[np.ndarray, np.ndarray]:
    """A worse and a better system: statistics of 300 sentences."""
    random = np.random.default_rng(1)
    words = ["casa", "perro", "gato", "mesa", "libro", "agua", "sol", "luna"]
    references = [" ".join(random.choice(words, 9)) for _ in range(300)]

    def system(mistakes: int) -> np.ndarray:
        outputs = []
        for reference in references:
            tokens = reference.split()
            for place in random.choice(9, mistakes, replace=False):
                tokens[place] = "otro"
            outputs.append(" ".join(tokens))
        return bleu_statistics(outputs, references)

    return system(3), system(2)


def test_the_bootstrap_sees_a_better_system_and_none_where_there_is_none(
    systems: tuple[np.ndarray, np.ndarray],
) -> None:
    worse, better = systems
    gains = bootstrap_gains(better, worse, 200)
    assert gains.shape == (200,)
    assert np.quantile(gains, 0.05) > 0
    assert gains.mean() == pytest.approx(bleu_from(better) - bleu_from(worse), abs=1)
    np.testing.assert_allclose(bootstrap_gains(worse, better, 200), -gains)
    assert not bootstrap_gains(worse, worse, 200).any()


def test_the_bootstrap_is_repeatable(systems: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(bootstrap_gains(*systems, 100), bootstrap_gains(*systems, 100))


def test_a_gain_by_chance_is_told_from_one_that_is_not(systems: tuple[np.ndarray, np.ndarray]) -> None:
    worse, better = systems
    assert chance_of_gain(better, worse, 200) == pytest.approx(1 / 201)
    assert chance_of_gain(worse, better, 200) == 1
    assert chance_of_gain(better, better, 200) == 1
    mixed = np.where(np.arange(len(worse))[:, None] % 2, better, worse)
    other = np.where(np.arange(len(worse))[:, None] % 2, worse, better)
    assert chance_of_gain(mixed, other, 200) > 0.05
