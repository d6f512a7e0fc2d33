"""See that a published model translates: pull it, every file verified, and let it loose on a few sentences.

    python -m scripts.smoke_test MODEL VERSION

Fails when a translation is empty or repeats its source.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tasks import registry
from tasks.data.tokenizer import load_tokenizer
from tasks.judging.translation import translate
from tasks.model import load_model
from tasks.storage import Store

SENTENCES = ["The house is big.", "My sister didn't buy tomatoes this week.", "Where is the train station?"]


def main(model: str, version: str) -> int:
    """Try a version; returns the exit code."""
    store = Store(os.environ.get("RETRAIN_BUCKET", "retrain"))
    prompt = registry.manifest(store, model, version).metadata["lineage"]["settings"]["preprocessing"]["prompt"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        registry.pull(store, model, version, directory)
        answers = translate(
            load_model(directory), load_tokenizer(directory), SENTENCES, prompt=prompt, max_new_tokens=40
        )
    bad = 0
    for sentence, answer in zip(SENTENCES, answers, strict=True):
        fine = bool(answer.strip()) and answer.strip() != sentence
        bad += not fine
        print(f"{'ok ' if fine else 'BAD'} {sentence} -> {answer}", flush=True)
    print(f"{model} {version}: {len(SENTENCES) - bad} of {len(SENTENCES)} sentences translated")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
