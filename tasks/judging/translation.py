"""Translation with a T5 in TensorFlow: sentences in, sentences out, as one at a time but many times faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tasks.model import length_batches
from tasks.progress import Progress

XLA_WIDTHS = (32, 64, 128, 256, 512, 1024)  # tokens; XLA compiles anew for each shape, so there are few


def translate(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    prompt: str,
    max_tokens: int = 128,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    beams: int = 1,
) -> list[str]:
    """Translations, greedy or of a beam, in the order of the sentences."""
    sources = encode(tokenizer, sentences, prompt, max_tokens)
    outputs = generate(model, sources, max_new_tokens=max_new_tokens, batch_size=batch_size, beams=beams)
    return decode(tokenizer, outputs)


def encode(tokenizer: Any, sentences: Sequence[str], prompt: str, max_tokens: int) -> list[list[int]]:
    """Token ids of what the model reads: prompt, sentence, end token."""
    if not sentences:
        return []
    return tokenizer([prompt + text for text in sentences], truncation=True, max_length=max_tokens)["input_ids"]


def decode(tokenizer: Any, outputs: Sequence[Sequence[int]]) -> list[str]:
    """What people read; tokens that stand for no text are left out."""
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)


def generate(
    model: Any,
    sources: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    beams: int = 1,
    xla: bool | None = None,
    label: str = "translate",
) -> list[list[int]]:
    """Token ids of the translations, without start and end, in the order of the sources.

    Sentences of similar length share a batch, and every batch runs the same compiled graph, which gives the outputs of
    one sentence at a time. `xla` (where there is a GPU, unless said otherwise) compiles it for each shape; then batches
    are filled up to few shapes.
    """
    if xla is None:
        xla = bool(tf.config.list_physical_devices("GPU"))
    config = model.config
    fixed = min(batch_size, len(sources)) if xla or beams > 1 else None  # beam search wants to know a batch's rows

    @tf.function(input_signature=[tf.TensorSpec([fixed, None], tf.int32)] * 2, jit_compile=xla)
    def generate_batch(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> tf.Tensor:
        return model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            num_beams=beams,
            do_sample=False,
        )

    outputs: list[list[int]] = [[]] * len(sources)
    with Progress(label, total=len(sources), unit="sentences") as progress:
        for batch in length_batches([len(row) for row in sources], batch_size):
            rows = [sources[i] for i in batch]
            width = max(len(row) for row in rows)
            if xla:
                width = next((enough for enough in XLA_WIDTHS if enough >= width), width)
            if fixed:
                rows += [rows[-1]] * (fixed - len(rows))
            input_ids = padded(rows, config.pad_token_id, width)
            mask = padded([[1] * len(row) for row in rows], 0, width)
            answers = generate_batch(tf.constant(input_ids), tf.constant(mask)).numpy()
            for i, answer in zip(batch, answers, strict=False):  # the last ones may be there to fill the batch
                outputs[i] = until_end(answer[1:].tolist(), config)
            progress.advance(len(batch))
    return outputs


def until_end(tokens: list[int], config: Any) -> list[int]:
    """The tokens before the end token, without padding."""
    end = tokens.index(config.eos_token_id) if config.eos_token_id in tokens else len(tokens)
    return [token for token in tokens[:end] if token != config.pad_token_id]


def padded(rows: Sequence[Sequence[int]], value: int, width: int | None = None) -> np.ndarray:
    """Rows of different length as one int32 array (rows, width), filled on the right."""
    return tf.keras.utils.pad_sequences(rows, width, padding="post", value=value)
