"""Translation, by whatever engine and in whatever batches, gives what one sentence at a time gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tasks.data.tokenizer import load_tokenizer
from tasks.judging import ctranslate
from tasks.judging.examine import agreement, sentence_losses, spread
from tasks.judging.translation import decode, encode, generate, translate
from tasks.model import load_model

BASE = Path(__file__).resolve().parents[2] / "examples" / "demo" / "base-model"
PROMPT = "translate English to Spanish: "
SENTENCES = ["My wife has a car.", "Yes.", "", "Where is the computer that my father bought yesterday?", "Yes."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(BASE)


@pytest.fixture(scope="module")
def sources(tokenizer: Any) -> list[list[int]]:
    return encode(tokenizer, SENTENCES, PROMPT, 128)


def alone(model: Any, tokenizer: Any, beams: int) -> list[str]:
    """The transformers way: one sentence at a time, eagerly."""
    texts = []
    for sentence in SENTENCES:
        ids = tokenizer(PROMPT + sentence, return_tensors="tf")
        output = model.generate(**ids, max_new_tokens=24, num_beams=beams, do_sample=False)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_batches_translate_as_one_sentence_at_a_time(batch_size: int, beams: int, model: Any, tokenizer: Any) -> None:
    together = translate(
        model, tokenizer, SENTENCES, prompt=PROMPT, max_new_tokens=24, batch_size=batch_size, beams=beams
    )
    assert together == alone(model, tokenizer, beams)


def test_xla_translates_as_one_sentence_at_a_time(model: Any, tokenizer: Any, sources: list[list[int]]) -> None:
    outputs = generate(model, sources, max_new_tokens=24, batch_size=2, xla=True)
    assert decode(tokenizer, outputs) == alone(model, tokenizer, 1)


def test_ctranslate2_translates_as_tensorflow(model: Any, tokenizer: Any, sources: list[list[int]]) -> None:
    translator = ctranslate.load(BASE, tokenizer)
    outputs = ctranslate.generate(translator, tokenizer, sources, max_new_tokens=24, batch_size=2, beams=1)
    assert outputs == generate(model, sources, max_new_tokens=24, batch_size=2)


def test_ctranslate2_uses_the_weights_that_are_there(
    model: Any, tokenizer: Any, sources: list[list[int]], tmp_path: Path
) -> None:
    """Every tensor counts: with any kind of them set to zero, something else comes out."""
    trusted = generate(model, sources, max_new_tokens=24, batch_size=8)
    weights = load_file(BASE / "model.safetensors")
    for part in ("SelfAttention.q", "EncDecAttention.v", "wi_1", "wo", "lm_head", "relative_attention_bias", "shared"):
        directory = tmp_path / part
        shutil.copytree(BASE, directory)
        save_file(
            {name: np.zeros_like(value) if part in name else value for name, value in weights.items()},
            directory / "model.safetensors",
        )
        translator = ctranslate.load(directory, tokenizer)
        outputs = ctranslate.generate(translator, tokenizer, sources, max_new_tokens=24, batch_size=8, beams=1)
        assert outputs != trusted, part


def test_nothing_translates_to_nothing(model: Any, tokenizer: Any) -> None:
    assert translate(model, tokenizer, [], prompt=PROMPT) == []


def test_a_sentence_has_the_same_loss_in_any_batch(model: Any, tokenizer: Any, sources: list[list[int]]) -> None:
    labels = encode(tokenizer, ["Mi esposa tiene un carro.", "Sí.", "", "¿Dónde está la computadora?", "No."], "", 128)
    together = sentence_losses(model, sources, labels, 64)
    one_by_one = [sentence_losses(model, sources[i : i + 1], labels[i : i + 1], 1)[0] for i in range(len(labels))]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4)


def test_a_sample_is_spread_from_short_to_long() -> None:
    assert spread([5, 1, 9, 3, 7], 3) == [1, 0, 2]
    assert sorted(spread([2, 2, 2], 48)) == [0, 1, 2]
    assert spread([], 48) == []
    assert agreement(["a", "b"], ["a", "c"]) == 0.5
