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


def gain_intervals(gains: dict[str, tuple[float, float, float]]) -> str:
    """Differences with their confidence intervals, a line each: `{label: (observed, low, high)}`; zero is marked."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 0.8 + 0.34 * len(gains)), layout="constrained")
        places = range(len(gains))
        axes.axvline(0, color=INK, linewidth=1, linestyle="--")
        for place, (observed, low, high) in zip(places, gains.values(), strict=True):
            color = CANDIDATE if low > 0 else CHAMPION if high < 0 else INK
            axes.plot([low, high], [place, place], color=color, linewidth=2.5, solid_capstyle="round")
            axes.plot([observed], [place], color=color, marker="o")
        axes.set_yticks(list(places), list(gains))
        axes.set_ylim(len(gains) - 0.5, -0.5)
        axes.set_xlabel("candidate minus champion")
        return _svg(figure)


def trend(values: list[float | None]) -> str:
    """One number over versions, oldest first; a version without it leaves a gap."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
        numbers = [float("nan") if value is None else value for value in values]
        axes.plot(range(1, len(numbers) + 1), numbers, color=CANDIDATE, marker="o")
        axes.set(xlabel="version", xticks=range(1, len(numbers) + 1, max(1, len(numbers) // 10)))
        axes.margins(y=0.2)
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
        step = -(-len(edges) // 12)  # more labels would run into each other
        axes.set_xticks([edge - 0.5 for edge in range(0, len(edges), step)], [f"{edge:g}" for edge in edges[::step]])
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
