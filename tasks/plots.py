"""Plots as SVG text that a page can hold: no files, no fonts from elsewhere, readable on light and on dark."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt

CANDIDATE, CHAMPION, INK = "#2a78d6", "#e07b39", "#8a8f98"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "retrain",  # the same plot gives the same bytes
    "font.family": "sans-serif",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def loss_curve(epochs: list[dict[str, Any]]) -> str:
    """Training and validation loss per target token over epochs; epoch 0 is the base model."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
        trained = [row for row in epochs if row["training_loss"] is not None]
        axes.plot(
            [row["epoch"] for row in trained],
            [row["training_loss"] for row in trained],
            color=INK,
            linestyle="--",
            marker="o",
            label="training",
        )
        axes.plot(
            [row["epoch"] for row in epochs],
            [row["validation_loss"] for row in epochs],
            color=CANDIDATE,
            marker="o",
            label="validation",
        )
        axes.set(xlabel="epoch", ylabel="loss per target token", xticks=[row["epoch"] for row in epochs])
        axes.legend()
        return _svg(figure)


def score_bars(scores: dict[str, tuple[float, float]]) -> str:
    """Champion beside candidate, one pair of bars a score: `{label: (champion, candidate)}`."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 0.5 + 0.55 * len(scores)), layout="constrained")
        places = range(len(scores))
        champion, candidate = zip(*scores.values(), strict=True)
        for offset, values, color, label in (
            (-0.2, champion, CHAMPION, "champion"),
            (0.2, candidate, CANDIDATE, "candidate"),
        ):
            bars = axes.barh([p + offset for p in places], values, height=0.36, color=color, label=label)
            axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set_yticks(list(places), list(scores))
        axes.invert_yaxis()
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        return _svg(figure)


def histogram(edges: list[float], counts: dict[str, list[int]], label: str) -> str:
    """Bars between edges, one series a name, side by side; the last bar holds all that is beyond its edge."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
        width = 0.8 / len(counts)
        for place, (name, values) in enumerate(counts.items()):
            offset = place * width - 0.4 + width / 2
            places = [bar + offset for bar in range(len(values))]
            axes.bar(places, values, width=width, color=(CANDIDATE, CHAMPION)[place % 2], label=name)
        axes.set(xlabel=label, ylabel="pairs")
        axes.set_xticks([edge - 0.5 for edge in range(len(edges))], [f"{edge:g}" for edge in edges])
        if len(counts) > 1:
            axes.legend()
        return _svg(figure)


def count_bars(counts: dict[str, int], label: str) -> str:
    """A horizontal bar for each name, with its number."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 0.6 + 0.3 * len(counts)), layout="constrained")
        bars = axes.barh(list(counts), list(counts.values()), height=0.6, color=CANDIDATE)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel=label)
        return _svg(figure)


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
