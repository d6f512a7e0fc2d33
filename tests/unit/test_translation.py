"""Translation in batches gives what one sentence at a time gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.model import load_model
from tasks.tokenizer import load_tokenizer
from tasks.translation import translate

BASE = Path(__file__).resolve().parents[2] / "examples" / "demo" / "base-model"
PROMPT = "translate English to Spanish: "


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(BASE)


def test_batches_translate_as_one_sentence_at_a_time(model: Any, tokenizer: Any) -> None:
    sentences = ["My wife has a car.", "Yes.", "", "Where is the computer that my father bought yesterday?", "Yes."]
    together = translate(model, tokenizer, sentences, prompt=PROMPT, max_new_tokens=24, batch_size=2)
    alone = []
    for sentence in sentences:
        ids = tokenizer(PROMPT + sentence, return_tensors="tf")
        output = model.generate(**ids, max_new_tokens=24, num_beams=1, do_sample=False)
        alone.append(tokenizer.decode(output[0], skip_special_tokens=True))
    assert together == alone
    assert translate(model, tokenizer, [], prompt=PROMPT) == []
