"""Translation with a T5 in TensorFlow: sentences in, sentences out, as one at a time but many times faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tasks.model import length_batches, pad
from tasks.progress import Progress


def translate(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    prompt: str,
    max_tokens: int = 128,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    label: str = "translate",
) -> list[str]:
    """Greedy translations, in the order of the sentences.

    Sentences of similar length share a batch and every batch of a width runs the same compiled graph, which gives the
    outputs of one sentence at a time, many times faster.
    """
    if not sentences:
        return []
    encoded = tokenizer([prompt + s for s in sentences], truncation=True, max_length=max_tokens)["input_ids"]
    pad_id = model.config.pad_token_id

    @tf.function(reduce_retracing=False)
    def generate(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> tf.Tensor:
        return model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            do_sample=False,
        )

    translations = [""] * len(sentences)
    progress = Progress(label, total=len(sentences), unit="sentences")
    for batch in length_batches([len(row) for row in encoded], batch_size):
        input_ids = pad([encoded[i] for i in batch], pad_id)
        missing = batch_size - len(batch)
        if missing > 0 and len(sentences) > batch_size:  # a short last batch would be traced anew
            input_ids = np.concatenate([input_ids, np.repeat(input_ids[-1:], missing, axis=0)])
        mask = (input_ids != pad_id).astype(np.int32)
        outputs = generate(tf.constant(input_ids), tf.constant(mask)).numpy()[: len(batch)]
        for row, text in zip(batch, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
            translations[row] = text
        progress.advance(len(batch))
    progress.close()
    return translations
