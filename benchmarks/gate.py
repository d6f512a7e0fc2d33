"""How often the gate is wrong: its promote rate for candidates whose true difference from the champion is known.

    python benchmarks/gate.py s3://retrain/runs/RUN_ID --figure docs/images/gate-power.svg
    python benchmarks/gate.py translations.parquet           # the same, from the table that evaluate left
    python benchmarks/gate.py CORPUS --noise 0.3 --differ 0.5    # a corpus's references and two noisy copies of them

Two systems have translated the same real sentences: an evaluated run's champion and candidate, or two copies of a
corpus's references in which words are dropped, swapped and replaced. These sentences are taken as all that there are.
Where the two translations of one differ, champion and candidate get one each; the candidate gets the better one (by
the sentence's BLEU) with a probability that makes its BLEU over all sentences differ from the champion's as wanted. So
the two differ on as many sentences, and by as much, as the two systems do, whatever the true difference is. Test sets
are drawn from these sentences, hundreds a point, and the gate's relative checks decide on each.

Prints how often they promote (and writes it as a figure), what each check lets through, and how often the slices
refuse an equal candidate and one that loses on one of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt

from tasks.evaluate import read_tables
from tasks.gate import better, nothing_hidden
from tasks.judging.metrics import SYSTEMS, TEST, slice_members, slice_scores
from tasks.judging.scoring import bleu_from, bleu_of_total, bleu_statistics, bootstrap_gains, chance_of_gain
from tasks.pages.plots import STYLE
from tasks.run import Run
from tasks.settings import Gate, load

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo" / "corpus"
DIFFERENCES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)  # true BLEU, candidate minus champion
TEST_SIZES = (500, 2000, 5000)  # sentences
SIZE = 2000  # where one check is held against another
CONFIDENCES = (0.95, 0.96, 0.975)
SLICE_LOSSES = ((None, 0), ("with a number", 2), ("with a number", 4), ("of 13-24 words", 4))  # true BLEU
GATE = ("BLEU not worse than champion", "BLEU gain over champion", "BLEU gain not by chance", "worst slice")


@dataclass(frozen=True)
class Population:
    """All the sentences there are: BLEU statistics of the better and the worse translation of each, and the slices."""

    better: np.ndarray
    worse: np.ndarray
    slices: dict[str, np.ndarray]

    @classmethod
    def of(cls, table: pd.DataFrame) -> Population:
        """From texts: `source`, `reference`, and each system's translation."""
        one, other = (bleu_statistics(table[system], table["reference"]) for system in SYSTEMS)
        first_is_better = (sentence_bleu(one) >= sentence_bleu(other))[:, None]
        return cls(
            np.where(first_is_better, one, other),
            np.where(first_is_better, other, one),
            slice_members(table),
        )

    def difference(self, share: float) -> float:
        """The candidate's BLEU minus the champion's, over all sentences, when it has this share of the better ones."""
        best, rest = self.better.sum(axis=0), self.worse.sum(axis=0)
        return bleu_of_total(share * best + (1 - share) * rest) - bleu_of_total(share * rest + (1 - share) * best)

    def share_for(self, difference: float) -> float:
        """The share of the better translations that makes the true difference."""
        low, high = 0.0, 1.0
        if not self.difference(low) <= difference <= self.difference(high):
            raise SystemExit(f"the two systems are too alike for a difference of {difference:+} BLEU")
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.difference(middle) < difference else (low, middle)
        return low

    def part(self, rows: np.ndarray) -> Population:
        """Some of the sentences."""
        return Population(self.better[rows], self.worse[rows], {})

    def draw(
        self, size: int, share: float | np.ndarray, random: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A test set: each system's statistics, and the slices. The share may be another for every sentence."""
        rows = random.integers(len(self.better), size=size)
        wins = (random.random(size) < np.broadcast_to(share, len(self.better))[rows])[:, None]
        best, rest = self.better[rows], self.worse[rows]
        counts = {"candidate": np.where(wins, best, rest), "champion": np.where(wins, rest, best)}
        return counts, {name: members[rows] for name, members in self.slices.items()}


def sentence_bleu(statistics: np.ndarray) -> np.ndarray:
    """BLEU of each sentence, smoothed by adding one to the counts of longer n-grams: (rows,)."""
    matched, total = statistics[:, :4] + [0, 1, 1, 1], statistics[:, 4:8] + [0, 1, 1, 1]
    length, reference = statistics[:, 8], statistics[:, 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.exp(np.log(matched / total).mean(axis=1) + np.minimum(0, 1 - reference / length)))


def translations_of(source: str, noise: float, differ: float) -> pd.DataFrame:
    """What two systems have made of real sentences: columns `source`, `reference`, `champion`, `candidate`."""
    if source.startswith("s3://"):
        table, _ = read_tables(Run.at(source))
    elif source.endswith(".parquet"):
        table = pd.read_parquet(source)
    else:
        return noisy(Path(source), noise, differ)
    return table[table["set"] == TEST].reset_index(drop=True)


def noisy(corpus: Path, noise: float, differ: float) -> pd.DataFrame:
    """References of a corpus's test split, and two damaged copies, which differ on a share of the sentences.

    A sentence's share of damaged words varies from none to all, as the quality of real translations does.
    """
    rows = pd.concat(map(pd.read_parquet, sorted(corpus.rglob("test*.parquet"))))["translation"]
    language, target = load(ROOT / "config" / "en-es.yaml").data.languages
    table = pd.DataFrame({"source": [row[language] for row in rows], "reference": [row[target] for row in rows]})
    table = table[(table["source"].str.strip() != "") & (table["reference"].str.strip() != "")].reset_index(drop=True)
    random = np.random.default_rng(0)
    words = np.array(" ".join(table["reference"]).split())
    rates = random.beta(1, 1 / noise - 1, len(table))

    def damaged(text: str, rate: float) -> str:
        found = text.split()
        for place in np.flatnonzero(random.random(len(found)) < rate)[::-1]:
            match random.integers(3):
                case 0:
                    del found[place]
                case 1 if place + 1 < len(found):
                    found[place], found[place + 1] = found[place + 1], found[place]
                case _:
                    found[place] = str(random.choice(words))
        return " ".join(found)

    table["champion"] = [damaged(*row) for row in zip(table["reference"], rates, strict=True)]
    again = [damaged(*row) for row in zip(table["reference"], rates, strict=True)]
    table["candidate"] = np.where(random.random(len(table)) < differ, again, table["champion"])
    return table


def judge(counts: dict[str, np.ndarray], slices: dict[str, np.ndarray], limits: Gate) -> dict[str, bool]:
    """Which of the gate's relative checks hold on a test set, by name; and whether BLEU's hold at other confidences."""
    candidate, champion = counts["candidate"], counts["champion"]
    gains = bootstrap_gains(candidate, champion, limits.bootstrap_samples)
    found: dict[str, Any] = {
        "gain": {"bleu": {"low": float(np.quantile(gains, 1 - limits.confidence))}},
        "chance": chance_of_gain(candidate, champion, limits.bootstrap_samples),
        "slices": slice_scores(counts, slices, limits),
    }
    checks = [*better(found, limits), *nothing_hidden(found, limits)]
    held = {check.name: check.passed for check in checks if check.name in GATE}
    held["promoted"] = all(held.values())
    changes = [part["candidate"] - part["champion"] for part in found["slices"].values()]
    held["no slice 2 below"] = min(changes) >= -2
    for confidence in CONFIDENCES:
        surely, chance = np.quantile(gains, 1 - confidence) >= 0, found["chance"] <= round(1 - confidence, 9)
        held |= {f"bootstrap, {confidence}": surely, f"both, {confidence}": surely and chance}
    return held


def main() -> None:
    """Draw, decide, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=str(DEMO), help="an evaluated run, its table, or a corpus")
    parser.add_argument("--noise", type=float, default=0.3, help="share of a reference's words that a copy damages")
    parser.add_argument("--differ", type=float, default=0.5, help="share of the sentences on which two copies differ")
    parser.add_argument("--draws", type=int, default=400, help="test sets a point")
    parser.add_argument("--resamples", type=int, default=300, help="gate.bootstrap_samples")
    parser.add_argument("--pipeline", type=Path, default=ROOT / "config" / "en-es.yaml", help="whose gate it is")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    limits = load(arguments.pipeline).gate.model_copy(update={"bootstrap_samples": arguments.resamples})

    table = translations_of(arguments.source, arguments.noise, arguments.differ)
    population, random = Population.of(table), np.random.default_rng(0)
    scores = [bleu_from(bleu_statistics(table[system], table["reference"])) for system in SYSTEMS]
    print(
        f"{len(table):,} sentences; BLEU {scores[0]:.2f} and {scores[1]:.2f}; the two differ on "
        f"{(table['champion'] != table['candidate']).mean():.0%}; margin {limits.non_inferiority_margin}, "
        f"gain {limits.min_gain}, confidence {limits.confidence}; {arguments.draws} draws a point, "
        f"{arguments.resamples} resamples; {os.cpu_count()} CPUs"
    )
    started = time.monotonic()
    held = {
        (difference, size): [
            judge(*population.draw(size, population.share_for(difference), random), limits)
            for _ in range(arguments.draws)
        ]
        for difference in DIFFERENCES
        for size in TEST_SIZES
    }

    def rates(name: str, size: int) -> list[float]:
        return [float(np.mean([each[name] for each in held[difference, size]])) for difference in DIFFERENCES]

    labels = [f"{difference:+.1f}" for difference in DIFFERENCES]
    promoted = {f"{size:,} sentences": rates("promoted", size) for size in TEST_SIZES}
    print_table("true BLEU difference: promoted", labels, promoted)
    names = [*GATE, "no slice 2 below", *(f"{test}, {c}" for c in CONFIDENCES for test in ("bootstrap", "both"))]
    print_table(f"{SIZE:,} sentences: holds", labels, {name: rates(name, SIZE) for name in names})

    refused: dict[str, list[float]] = {}
    for name, loss in SLICE_LOSSES:
        share: float | np.ndarray = population.share_for(0)
        if name:
            members = population.slices[name]
            share = np.where(members, population.part(members).share_for(-loss), share)
        for size in TEST_SIZES:
            found = [judge(*population.draw(size, share, random), limits) for _ in range(arguments.draws)]
            for check in ("worst slice", "no slice 2 below"):
                refused.setdefault(f"{check}, {size:,}", []).append(float(np.mean([not each[check] for each in found])))
    labels = [f"loses {loss} {name}" if name else "equal" for name, loss in SLICE_LOSSES]
    print_table("candidate: refused by", labels, refused)
    print(f"{time.monotonic() - started:.0f} s")

    if arguments.figure:
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
            for label, values in promoted.items():
                axes.plot(DIFFERENCES, values, marker="o", label=label)
            axes.set(xlabel="true BLEU difference, candidate minus champion", ylabel="promoted", ylim=(-0.03, 1.03))
            axes.legend()
            figure.savefig(arguments.figure, metadata={"Date": None})


def print_table(corner: str, labels: Sequence[str], columns: dict[str, list[float]]) -> None:
    """Rates as a Markdown table."""
    print(f"| {corner} | " + " | ".join(columns) + " |\n|---:|" + "---:|" * len(columns))
    for label, *row in zip(labels, *columns.values(), strict=True):
        print(f"| {label} | " + " | ".join(f"{rate:.1%}" for rate in row) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
