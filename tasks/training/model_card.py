"""The candidate's README.md: what the model is, what it was made of and how, and what it is not good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.settings import Settings

TEMPLATES = Environment(  # Markdown, not HTML: what a file in config/ says is shown as it is
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=False,  # noqa: S701
    undefined=StrictUndefined,
    trim_blocks=True,
)


def model_card(
    settings: Settings, base: dict[str, Any], data: dict[str, Any], aside: int, summary: dict[str, Any]
) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    `base` and `data` are what the artifacts' manifests say of their origin; `summary` is training's. There is no time
    in it: the same training gives the same card.
    """
    source, target = settings.data.languages
    front_matter = {
        "language": [source, target],
        "library_name": "transformers",
        "pipeline_tag": "translation",
        "license": settings.base_model.licence.lower(),
        "base_model": settings.base_model.source,
        "datasets": [settings.data.source],
    }
    decisive = settings.training.decisive
    return TEMPLATES.get_template("model_card.md.j2").render(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True),
        settings=settings,
        languages=(source, target),
        base={**base, "licence": settings.base_model.licence},
        data={**data, "licence": settings.data.licence},
        rows=data["rows"],
        aside=aside,
        parameters=sum(row["parameters"] for row in summary["parameters"]),
        trainable=sum(row["trainable"] for row in summary["parameters"]),
        training={name.replace("_", " "): value for name, value in decisive.items() if name != "freeze"},
        **{name: summary[name] for name in ("epochs", "best_epoch", "weight_change")},
    )
