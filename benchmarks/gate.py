"""How often the gate is wrong: its promote rate for candidates whose true difference from the champion is known.

    python benchmarks/gate.py s3://retrain/runs/RUN_ID --figure docs/images/gate-power.svg

The sentences and translations of one evaluated run are taken as all the sentences there are. Champion and candidate are
independent mixtures of the run's two systems: the champion has each system's translation of half of the sentences, the
candidate the better one's of such a share that BLEU over all sentences differs by the wanted amount. So they differ in
about half of their sentences, whatever the difference. For every point hundreds of test sets are drawn, and the gate's
relative checks (not worse, better by `min_gain`, and not by chance) decide on each.

Prints a table; writes the same as a figure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt

from tasks.evaluate import read_tables
from tasks.judging.metrics import SYSTEMS, TEST
from tasks.judging.scoring import bleu_from, bootstrap_gains, chance_of_gain
from tasks.pages.plots import STYLE
from tasks.run import Run
from tasks.settings import Gate

DIFFERENCES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # true BLEU, candidate minus champion
TEST_SIZES = (500, 2000, 5000)  # sentences


def mixture(better: np.ndarray, worse: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """A system that has the better one's translation of a random share of the sentences."""
    return np.where(random.random(len(better))[:, None] < share, better, worse)


def share_for(difference: float, better: np.ndarray, worse: np.ndarray) -> float:
    """The share of the better system's sentences that a mixture needs to differ so much in BLEU from an even one."""

    def bleu(share: float) -> float:
        return bleu_from(better * share + worse * (1 - share))

    low, high = 0.0, 1.0
    if not bleu(low) <= bleu(0.5) + difference <= bleu(high):
        raise SystemExit(f"the run's systems are too alike for a difference of {difference:+} BLEU")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if bleu(middle) < bleu(0.5) + difference else (low, middle)
    return low


def promoted(candidate: np.ndarray, champion: np.ndarray, margin: float, gain: float | None, confidence: float) -> bool:
    """What the gate's relative checks say of one test set."""
    surely = float(np.quantile(bootstrap_gains(candidate, champion, 300), 1 - confidence))
    if gain is None or surely < max(gain, -margin):
        return gain is None and surely >= -margin
    return chance_of_gain(candidate, champion, 300) <= 1 - confidence


def main() -> None:
    """Draw, decide, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="an evaluated run, s3://BUCKET/runs/RUN_ID")
    parser.add_argument("--draws", type=int, default=200, help="test sets a point")
    parser.add_argument("--margin", type=float, default=0.3, help="gate.non_inferiority_margin")
    parser.add_argument("--gain", type=float, default=0.0, help="gate.min_gain")
    parser.add_argument("--confidence", type=float, default=Gate().confidence, help="gate.confidence")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()

    run = Run.at(arguments.run)
    translations, _ = read_tables(run)
    test = translations[translations["set"] == TEST]
    systems = [np.stack(test[f"{system}_statistics"].tolist()) for system in SYSTEMS]
    worse, better = sorted(systems, key=bleu_from)
    print(f"{len(worse):,} sentences, BLEU {bleu_from(worse):.2f} and {bleu_from(better):.2f}; {os.cpu_count()} CPUs")

    random = np.random.default_rng(0)
    rates: dict[str, list[float]] = {}
    started = time.monotonic()
    print("| true difference | " + " | ".join(f"{size:,} sentences" for size in TEST_SIZES) + " |")
    print("|---:|" + "---:|" * len(TEST_SIZES))
    for difference in DIFFERENCES:
        share = share_for(difference, better, worse)
        row = []
        for size in TEST_SIZES:
            count = 0
            for _ in range(arguments.draws):
                drawn = random.integers(len(worse), size=size)
                candidate = mixture(better[drawn], worse[drawn], share, random)
                champion = mixture(better[drawn], worse[drawn], 0.5, random)
                count += promoted(candidate, champion, arguments.margin, arguments.gain, arguments.confidence)
            row.append(count / arguments.draws)
            rates.setdefault(f"{size:,} sentences", []).append(row[-1])
        print(f"| {difference:+.1f} | " + " | ".join(f"{rate:.1%}" for rate in row) + " |", flush=True)
    print(f"{time.monotonic() - started:.0f} s")

    if arguments.figure:
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
            for label, values in rates.items():
                axes.plot(DIFFERENCES, values, marker="o", label=label)
            axes.set(xlabel="true BLEU difference, candidate minus champion", ylabel="promoted", ylim=(-0.03, 1.03))
            axes.legend()
            figure.savefig(arguments.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
