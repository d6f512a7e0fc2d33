"""How the service translates, from the directory that was pulled.

With CTranslate2 in int8, where that is installed and the version carries such a copy; else with TensorFlow.

Another engine is another function that takes the directory, prompt and longest sequence, and returns what translates a
batch. Each imports what it needs, so that a service for CPUs needs no TensorFlow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Translate = Callable[[list[str]], list[str]]

CTRANSLATE2 = find_spec("ctranslate2") is not None


def load(directory: Path, manifest: dict[str, Any]) -> tuple[str, Translate]:
    """The engine's name, and what translates a batch with the prompt that the model was trained with.

    Raises for a directory that is no model.
    """
    settings = manifest.get("lineage", {}).get("settings", {})
    prompt = settings.get("preprocessing", {}).get("prompt", "")
    longest = settings.get("preprocessing", {}).get("max_tokens", 128)
    if CTRANSLATE2 and (directory / "ctranslate2").is_dir():
        return "ctranslate2", with_ctranslate2(directory, prompt, longest)
    return "tensorflow", with_tensorflow(directory, prompt, longest)


def with_ctranslate2(directory: Path, prompt: str, longest: int) -> Translate:
    """Greedy translation in int8, on the CPU."""
    import ctranslate2  # noqa: PLC0415
    from tokenizers import Tokenizer  # noqa: PLC0415

    translator = ctranslate2.Translator(str(directory / "ctranslate2"), device="cpu")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(longest)

    def translate(sentences: list[str]) -> list[str]:
        sources = [encoded.tokens for encoded in tokenizer.encode_batch([prompt + sentence for sentence in sentences])]
        answers = translator.translate_batch(sources, beam_size=1, max_decoding_length=longest)
        ids = [[tokenizer.token_to_id(token) for token in answer.hypotheses[0]] for answer in answers]
        return tokenizer.decode_batch([[one for one in each if one is not None] for each in ids])

    return translate


def with_tensorflow(directory: Path, prompt: str, longest: int) -> Translate:
    """Greedy translation in full precision."""
    from tasks.data.tokenizer import load_tokenizer  # noqa: PLC0415
    from tasks.model import load_model  # noqa: PLC0415

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
