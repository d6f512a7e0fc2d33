"""Translate the demo's sentences with the base model and with the promoted one, as a service that pulled it would.

    python -m scripts.before_after BASE_MODEL PROMOTED_MODEL PROMPT

A program of its own, so that whoever asks need not have TensorFlow in memory. Prints JSON: source, before, after.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tasks.data.tokenizer import load_tokenizer
from tasks.judging.translation import translate
from tasks.model import load_model

SENTENCES = [  # of the demo's test split: no model was trained on them
    "My grandmother's laptop is broken.",
    "Do you guys have to fix the bicycle tomorrow?",
    "My sister didn't buy tomatoes this week.",
]


def main(base: str, promoted: str, prompt: str) -> None:
    """Print what each model makes of each sentence."""
    before, after = (
        translate(load_model(path), load_tokenizer(path), SENTENCES, prompt=prompt, max_new_tokens=40)
        for path in map(Path, (base, promoted))
    )
    rows = zip(SENTENCES, before, after, strict=True)
    print(json.dumps([{"source": s, "before": b, "after": a} for s, b, a in rows], ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
