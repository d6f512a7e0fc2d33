"""What one model makes of the sentences by which it is judged: its translations, and its loss on each reference."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from tasks.data.tokenizer import load_tokenizer
from tasks.judging import ctranslate
from tasks.judging.translation import decode, encode, generate, padded
from tasks.model import length_batches, load_model
from tasks.progress import Progress
from tasks.settings import Settings

log = logging.getLogger(__name__)

SAMPLE = 48  # sentences on which another engine, or another machine, is held against what is believed
AGREEMENT = 0.9  # the share of them that must be the same: rounding turns a few near-ties


@dataclass(frozen=True)
class Work:
    """One model's part of the evaluation.

    `translations`, a row a sentence of the test sets: `text`, `tokens` (how many), `unknown` (how many stand for no
    text). `losses`, a row a pair of the validation and the test split: `loss` in nats, summed over `tokens`, and
    `pieces`, the reference as the model's tokenizer writes it. `engine`: what translated.
    """

    translations: pd.DataFrame
    losses: pd.DataFrame
    engine: str


def examine(name: str, directory: Path, sentences: Sequence[str], pairs: pd.DataFrame, settings: Settings) -> Work:
    """Let the model in a directory translate the sentences and read the pairs (`source`, `reference`).

    CTranslate2's translations are used if it translates a sample as TensorFlow does, otherwise TensorFlow's.
    """
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    prompt, longest = settings.preprocessing.prompt, settings.preprocessing.max_tokens
    labels = encode(tokenizer, pairs["reference"].tolist(), "", longest)
    losses = sentence_losses(
        model, encode(tokenizer, pairs["source"].tolist(), prompt, longest), labels, settings.evaluation.batch_size
    )
    log.info("%s: loss %.4f per target token", name, losses.sum() / sum(map(len, labels)))
    sources = encode(tokenizer, sentences, prompt, longest)
    search = settings.evaluation.model_dump(include={"max_new_tokens", "batch_size", "beams"})

    def by_tensorflow(some: Sequence[Sequence[int]], label: str) -> list[list[int]]:
        return generate(model, some, label=label, **search)

    engine, label = f"tensorflow {version('tensorflow')}", f"{name} translates"
    outputs: list[list[int]] | None = None
    if settings.evaluation.engine == "ctranslate2":
        translator = ctranslate.load(directory, tokenizer)
        sample = [sources[row] for row in spread([len(source) for source in sources], SAMPLE)]
        trusted = by_tensorflow(sample, f"{name} translates a sample")
        alike = agreement(trusted, ctranslate.generate(translator, tokenizer, sample, **search))
        compared = f"as {engine} in {alike:.0%} of {len(sample)} sentences"
        if alike >= AGREEMENT:
            engine = f"ctranslate2 {version('ctranslate2')}, {compared}"
            outputs = ctranslate.generate(translator, tokenizer, sources, label=label, **search)
        else:
            log.warning("%s: ctranslate2 translates only %s, so it is not used", name, compared)
    if outputs is None:
        outputs = by_tensorflow(sources, label)
    unknown = tokenizer.unk_token_id
    return Work(
        pd.DataFrame(
            {
                "text": decode(tokenizer, outputs),
                "tokens": [len(tokens) for tokens in outputs],
                "unknown": [tokens.count(unknown) for tokens in outputs],
            }
        ),
        pd.DataFrame(
            {
                "loss": losses,
                "tokens": [len(tokens) for tokens in labels],
                "pieces": [tokenizer.convert_ids_to_tokens(tokens) for tokens in labels],
            }
        ),
        engine,
    )


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """Row numbers of at most `count` rows, from the shortest to the longest, evenly."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [
        int(order[i]) for i in np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    ]


def agreement(one: Sequence[Any], other: Sequence[Any]) -> float:
    """The share of outputs that are the same."""
    return sum(mine == theirs for mine, theirs in zip(one, other, strict=True)) / max(1, len(one))


def sentence_losses(
    model: Any, sources: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], batch_size: int
) -> np.ndarray:
    """Cross-entropy of each target, summed over its tokens, in nats: (rows,). No padding is counted, dropout is off."""
    pad = model.config.pad_token_id

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 3)
    def batch_losses(input_ids: tf.Tensor, attention_mask: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        start = tf.fill([tf.shape(targets)[0], 1], model.config.decoder_start_token_id)
        encoded = model.encoder(input_ids=input_ids, attention_mask=attention_mask, training=False)[0]
        states = model.decoder(
            input_ids=tf.concat([start, targets[:, :-1]], axis=1),
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            training=False,
        )[0]
        real = targets != pad  # logits are made only where there is a token
        logits = model.lm_head(tf.boolean_mask(states, real))
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.boolean_mask(targets, real), logits)
        return tf.math.segment_sum(each, tf.where(real)[:, 0])  # every row has at least its end token

    losses = np.zeros(len(labels))
    with Progress("loss", total=len(labels), unit="pairs") as progress:
        for batch in length_batches([len(row) for row in sources], batch_size):
            input_ids, targets = (padded([rows[i] for i in batch], pad) for rows in (sources, labels))
            mask = padded([[1] * len(sources[i]) for i in batch], 0)
            losses[batch] = batch_losses(tf.constant(input_ids), tf.constant(mask), tf.constant(targets)).numpy()
            progress.advance(len(batch))
    return losses
