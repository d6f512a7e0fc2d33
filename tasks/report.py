"""report: write one HTML page that explains the run.

    python -m tasks report --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/config.json and whatever the run's steps have left so far
Writes   runs/RUN_ID/report.html   self-contained: no network, light and dark
Result   where it is

It is written for every run, also for one that stopped or failed: then with what is known.
"""

from __future__ import annotations

import difflib
import logging
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks import plots
from tasks.__main__ import STEPS
from tasks.rules import RULES
from tasks.run import Run
from tasks.settings import Settings
from tasks.storage import MissingObjectError

log = logging.getLogger(__name__)

SHOWN = 20  # sentences on the page
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def run(run: Run) -> dict[str, Any]:
    """Write the page."""
    page = render(run)
    key = run.key("report.html")
    run.store.put(key, page.encode())
    return {"summary": f"s3://{run.store.bucket}/{key}", "report": key}


def render(run: Run) -> str:
    """The page's HTML. Everything that came from data or settings is escaped."""
    steps = {step: run.find_result(step) for step in STEPS if step != "report"}
    try:
        metrics = run.store.get_json(run.key("evaluation", "metrics.json"))
    except MissingObjectError:
        metrics = None
    return TEMPLATES.get_template("report.html.j2").render(
        run=run,
        config=run.config,
        settings=yaml.safe_dump(run.config["settings"], sort_keys=False, allow_unicode=True),
        steps=steps,
        outcome=outcome(steps, run.settings),
        gate=steps["gate"],
        metrics=metrics,
        rules=RULES,
        data_plots=data_plots(run, steps["validate"]),
        loss_plot=Markup(plots.loss_curve(steps["train"]["epochs"])) if steps["train"] else None,  # noqa: S704
        score_plot=Markup(plots.score_bars(scores(metrics))) if metrics else None,  # noqa: S704
        sentences=differing_sentences(run) if metrics else [],
    )


def outcome(steps: dict[str, dict[str, Any] | None], settings: Settings) -> tuple[str, str]:
    """The run in one word and one sentence."""
    pulled, gate = steps["pull"], steps["gate"]
    if steps["promote"]:
        return "promoted", steps["promote"]["summary"]
    if gate and gate["decision"] == "promote" and steps["reject"]:
        return "rejected", " ".join(steps["reject"]["reasons"])
    if gate and gate["decision"] == "promote" and settings.approval == "human":
        return "waiting", "Every check of the gate holds; a person has to approve the candidate."
    if gate and gate["decision"] == "reject":
        return "rejected", " ".join(check["sentence"] for check in gate["checks"] if not check["passed"])
    if pulled and not pulled["changed"]:
        return "unchanged", "Data, base model and settings are those that production was trained with."
    missing = next(step for step in STEPS if not steps.get(step) and step != "reject")
    return "incomplete", f"The run has no result of the {missing} step; the steps before it are shown below."


def scores(metrics: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """What the bars show: BLEU and chrF++ over everything, BLEU of each slice."""
    both = [(metrics["champion"], metrics["candidate"])]
    whole = {
        label: (champion[name]["score"], candidate[name]["score"])
        for champion, candidate in both
        for label, name in (("BLEU", "bleu"), ("chrF++", "chrf"))
    }
    slices = {f"BLEU, {name}": (part["champion"], part["candidate"]) for name, part in metrics["slices"].items()}
    return {**whole, **slices}


def data_plots(run: Run, validated: dict[str, Any] | None) -> dict[str, Markup]:
    """What the training pairs are like, by caption; of validation that failed there is the shape alone."""
    plots_by_caption: dict[str, str] = {}
    try:
        shape = run.store.get_json(run.key("validation", "shape.json"))
    except MissingObjectError:
        return {}
    lengths = {side: shape[side] for side in ("source", "target")}
    plots_by_caption["Length of the usable training sentences"] = plots.histogram(
        shape["length_edges"], lengths, "characters"
    )
    plots_by_caption["How much longer or shorter the translations are"] = plots.histogram(
        shape["ratio_edges"], {"pairs": shape["ratios"]}, "target length / source length"
    )
    found = {name: count for name, count in (validated or {}).get("quarantined", {}).items() if count}
    if found:
        plots_by_caption["Pairs with a fault, by rule"] = plots.count_bars(found, "pairs")
    return {caption: Markup(svg) for caption, svg in plots_by_caption.items()}  # noqa: S704


def differing_sentences(run: Run) -> list[dict[str, Any]]:
    """The test sentences on which champion and candidate differ most, with the differences marked."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "translations.parquet"
        run.store.download(run.key("evaluation", "translations.parquet"), path)
        table = pd.read_parquet(path, columns=["source", "reference", "champion", "candidate"])
    alike = [
        difflib.SequenceMatcher(None, champion.split(), candidate.split()).ratio()
        for champion, candidate in zip(table["champion"], table["candidate"], strict=True)
    ]
    most = table.assign(alike=alike).query("alike < 1").nsmallest(SHOWN, "alike")
    return [
        {
            "source": row["source"],
            "reference": row["reference"],
            "champion": mark_words(row["champion"], row["candidate"]),
            "candidate": mark_words(row["candidate"], row["champion"]),
        }
        for row in most.to_dict("records")
    ]


def mark_words(text: str, other: str) -> Markup:
    """The text with the words that the other lacks in `<mark>`."""
    words, theirs = text.split(), other.split()
    parts = []
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, words, theirs, autojunk=False).get_opcodes():
        part = escape(" ".join(words[start:end]))
        if part:
            parts.append(part if kind == "equal" else Markup("<mark>{}</mark>").format(part))
    return Markup(" ").join(parts)
