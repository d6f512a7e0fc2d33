"""Each kind of drift shows in its own distance, and a corpus is no distance from itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data import drift
from tasks.data.drift import MEASURES, Profile

SOURCE = ["the children", "my old friends", "our neighbours", "some people from the village", "both of your sisters"]
TARGET = ["los niños", "mis viejos amigos", "nuestros vecinos", "algunas personas del pueblo", "tus dos hermanas"]
Pairs = list[tuple[str, str]]
LIMITS = {"rows": 0.5, "lengths": 0.2, "languages": 0.05, "trigrams": 0.3}


def corpus(rows: int, seed: int) -> Pairs:
    rng = random.Random(seed)  # noqa: S311
    chosen = [(rng.randrange(5), rng.randint(10, 99)) for _ in range(rows)]
    return [
        (f"Yesterday {SOURCE[i]} bought {n} books in the town.", f"Ayer {TARGET[i]} compraron {n} libros en la ciudad.")
        for i, n in chosen
    ]


@pytest.fixture
def profile(tmp_path: Path) -> Callable[[Pairs], Profile]:
    def look(pairs: Pairs) -> Profile:
        table = pa.table({"source": [s for s, _ in pairs], "target": [t for _, t in pairs]})
        pq.write_table(table, tmp_path / "train.parquet")
        return drift.profile(tmp_path / "train.parquet")

    return look


def far(now: Profile, before: Profile) -> set[str]:
    found = drift.distances(now, before)
    assert tuple(found) == MEASURES
    assert all(0 <= found[measure] <= 1 for measure in MEASURES[1:])
    return {measure for measure, limit in LIMITS.items() if found[measure] > limit}


def test_the_same_is_no_distance_away(profile: Callable[[Pairs], Profile]) -> None:
    one = profile(corpus(500, 1))
    assert drift.distances(one, one) == dict.fromkeys(MEASURES, 0.0)


def test_more_of_the_same_is_near(profile: Callable[[Pairs], Profile]) -> None:
    assert far(profile(corpus(600, 2)), profile(corpus(500, 1))) == set()


CHANGES: dict[str, Callable[[Pairs], Pairs]] = {
    "rows": lambda pairs: pairs[: len(pairs) // 2],
    "lengths": lambda pairs: [(f"{s} {s}", f"{t} {t}") for s, t in pairs],
    "languages": lambda pairs: [(s, s if n % 10 == 0 else t) for n, (s, t) in enumerate(pairs)],
    "trigrams": lambda pairs: [(s.upper(), t.upper()) for s, t in pairs],
}


@pytest.mark.parametrize("measure", MEASURES)
def test_each_change_is_seen_by_its_own_measure_alone(measure: str, profile: Callable[[Pairs], Profile]) -> None:
    before = corpus(600, 1)
    now = profile(CHANGES[measure](before))
    assert far(now, profile(before)) == {measure}
    assert far(profile(before), now) == {measure}  # in either direction


def test_a_large_corpus_is_judged_by_a_sample_from_all_over_it(
    profile: Callable[[Pairs], Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "SAMPLE", 100)
    seen = profile([*corpus(500, 1), *corpus(500, 3)[:450]])
    assert seen.rows == 950
    assert len(seen.lengths["source"]) == 95


def test_texts_too_short_to_tell_their_language_are_no_drift(profile: Callable[[Pairs], Profile]) -> None:
    short = profile([("Yes.", "Sí."), ("No.", "No.")])
    assert drift.distances(short, short) == dict.fromkeys(MEASURES, 0.0)
