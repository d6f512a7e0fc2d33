"""How the service translates: with TensorFlow, from the directory that was pulled.

Another engine is another `load`: it takes the directory and the manifest, and returns what translates a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.data.tokenizer import load_tokenizer
from tasks.model import load_model

Translate = Callable[[list[str]], list[str]]


def load(directory: Path, manifest: dict[str, Any]) -> Translate:
    """What translates a batch, with the prompt that the model was trained with. Raises for a directory that is none."""
    settings = manifest.get("lineage", {}).get("settings", {})
    prompt = settings.get("preprocessing", {}).get("prompt", "")
    longest = settings.get("preprocessing", {}).get("max_tokens", 128)
    model, tokenizer, lock = load_model(directory), load_tokenizer(directory), threading.Lock()

    def translate(sentences: list[str]) -> list[str]:
        batch = tokenizer(
            [prompt + sentence for sentence in sentences],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="tf",
        )
        with lock:  # all cores work on one batch
            ids = model.generate(**batch, max_new_tokens=longest, num_beams=1, do_sample=False)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return translate
