"""Train a tokenizer and a small T5 from scratch, for where no pretrained model can be fetched.

The result is a standard `from_pretrained` directory that PyTorch and TensorFlow load: a stand-in for
google/flan-t5-base with its architecture (gated GELU, an output head of its own), far smaller.

    python examples/make_base_model.py --corpus DIR --pair en-es --size small --minutes 12 --output DIR

Reads    CORPUS/                 a corpus in the layout of Helsinki-NLP/opus-100
Writes   OUTPUT/                 config.json, generation_config.json, model.safetensors, tokenizer files, README.md

Training ends after --epochs or --minutes, whichever comes first; the learning rate falls to zero by then.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # before TensorFlow is imported: the model is a Keras 2 model
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import pyarrow as pa
import sentencepiece
import tensorflow as tf
from datasets import Dataset, load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import T5Config, T5TokenizerFast

from tasks.data.encoding import Encoder, encode
from tasks.judging.translation import translate
from tasks.model import BATCH, Batch, label_states, make_batch, new_model, save_model
from tasks.training.loss import cross_entropy, loss_meter

log = logging.getLogger("make_base_model")

PROMPT = "translate English to Spanish: "
ALPHABET = "".join(map(chr, range(33, 127))) + "áéíóúüñÁÉÍÓÚÜÑ¿¡«»“”‘’—–…ºª€°·"
LOG_EVERY = 10.0  # seconds
README = """# {size} T5, {pair}

Made by `examples/make_base_model.py` from {rows:,} sentence pairs: {parameters:,} parameters, {pieces:,} pieces, loss
{loss:.4f} per target token on the corpus's validation split. It stands in for a pretrained model where none can be
fetched, and is good for nothing else. It expects the prompt `{prompt}` in front of a sentence.
"""


@dataclass(frozen=True)
class Size:
    """How large the model is, and how it is trained."""

    pieces: int
    d_model: int
    heads: int
    d_ff: int
    layers: int
    peak_rate: float
    batch_tokens: int
    max_tokens: int
    dropout: float


SIZES = {
    "tiny": Size(2400, 96, 4, 256, 2, peak_rate=4e-3, batch_tokens=4096, max_tokens=64, dropout=0.05),
    "small": Size(8000, 256, 4, 512, 3, peak_rate=2e-3, batch_tokens=4096, max_tokens=96, dropout=0.1),
}


def train_tokenizer(texts: Iterable[str], pieces: int) -> T5TokenizerFast:
    """A Unigram tokenizer with T5's special pieces, which knows every character of Spanish.

    SentencePiece chooses the pieces, as it did for T5: the trainer in `tokenizers` needs half as many again for a text.
    """
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(unicodedata.normalize("NFC", text) for text in texts),
        model_writer=trained,
        model_type="unigram",
        vocab_size=pieces,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        unk_piece="<unk>",
        required_chars=ALPHABET,
        split_digits=True,  # numbers are copied digit by digit
        normalization_rule_name="identity",  # NFC, below, keeps what T5's own rules would replace
        minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=model.unk_id()))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", model.eos_id())]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)


def make_model(size: Size, pieces: int) -> Any:
    """A T5 like FLAN-T5, untrained."""
    model = new_model(
        T5Config(
            vocab_size=pieces,
            d_model=size.d_model,
            d_kv=size.d_model // size.heads,
            d_ff=size.d_ff,
            num_layers=size.layers,
            num_heads=size.heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=size.dropout,
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )
    # T5's initial embedding and head are made for tied weights and a huge corpus: with them a small model wastes its
    # first thousand steps on unlearning logits that are far too large.
    for weights in (model.shared.weights[0], model.lm_head.kernel):
        weights.assign(weights * size.d_model**-0.5)
    return model


def token_batches(
    inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], budget: int, seed: int
) -> Iterator[np.ndarray]:
    """Every row once, in batches of similar length that hold about `budget` tokens, in an order the seed decides."""
    random = np.random.default_rng(seed)
    lengths = np.array([len(source) + len(target) for source, target in zip(inputs, labels, strict=True)])
    order = np.argsort(lengths + random.uniform(0, 4, len(lengths)))
    batches = np.split(order, np.flatnonzero(np.diff(np.cumsum(lengths[order]) // budget)) + 1)
    for batch in random.permutation(len(batches)):
        yield batches[batch]


def train(model: Any, rows: Any, size: Size, *, epochs: int, minutes: float | None, seed: int) -> None:
    """Train all of the model, with warm-up and then a linear fall of the learning rate to zero at the end."""
    tf.keras.utils.set_random_seed(seed)
    optimizer = tf.keras.optimizers.Adam(0.0, beta_2=0.98, global_clipnorm=1.0)
    rate = optimizer.learning_rate
    variables = model.trainable_variables

    @tf.function(input_signature=[BATCH])
    def step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            states = label_states(model, batch, training=True)
            loss = cross_entropy(states, batch.targets, model.lm_head.kernel) / tf.cast(
                tf.size(batch.targets), tf.float32
            )
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss, tf.size(batch.targets)

    inputs, labels = rows["input_ids"][:], rows["labels"][:]
    total = epochs * sum(map(len, labels))
    seen, window, started = 0, [], time.monotonic()
    last_line, line_seen = started, 0
    for epoch in range(epochs):
        for batch in token_batches(inputs, labels, size.batch_tokens, seed + epoch):
            elapsed = time.monotonic() - started
            done = max(seen / total, elapsed / (60 * minutes) if minutes else 0.0)
            if done >= 1:
                return
            rate.assign(size.peak_rate * min(done / 0.05, (1 - done) / 0.95))
            loss, count = step(make_batch(model, [inputs[i] for i in batch], [labels[i] for i in batch]))
            seen += int(count)
            window.append(float(loss))
            now = time.monotonic()
            if now - last_line >= LOG_EVERY:
                speed, left = (seen - line_seen) / (now - last_line), (now - started) * (1 - done) / max(done, 1e-6)
                log.info(
                    "%3.0f%%  epoch %d/%d  loss %.4f  rate %.2e  %s tokens/s  %.1f min left",
                    100 * done, epoch + 1, epochs, np.mean(window), rate.numpy(), f"{speed:,.0f}", left / 60,
                )  # fmt: skip
                window, last_line, line_seen = [], now, seen


def read_split(corpus: str, pair: str, split: str, max_rows: int | None, cache: str) -> pd.DataFrame:
    """A split's usable pairs as columns `source` and `target`: both sides there, and not the same."""
    source, target = pair.split("-")
    rows = load_dataset(corpus, pair, split=split, cache_dir=cache)["translation"][:]
    usable = [
        (row[source], row[target])
        for row in rows
        if row[source].strip() and row[target].strip() and row[source] != row[target]
    ]
    return pd.DataFrame(usable[:max_rows], columns=["source", "target"])


def tokenise(texts: pd.DataFrame, tokenizer: Any, prompt: str, size: Size) -> Dataset:
    """Token ids of pairs, as the pipeline makes them."""
    batch = pa.RecordBatch.from_pandas(texts[["source", "target"]], preserve_index=False)
    return Dataset(
        pa.Table.from_batches([encode(batch, Encoder(tokenizer.backend_tokenizer), prompt, size.max_tokens)])
    )


def main() -> None:
    """Read the corpus, train the tokenizer, then the model; write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a corpus in the layout of Helsinki-NLP/opus-100")
    parser.add_argument("--pair", default="en-es")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-rows", type=int, help="train on so many pairs at most")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    size = SIZES[arguments.size]

    with tempfile.TemporaryDirectory() as cache:
        texts = read_split(arguments.corpus, arguments.pair, "train", arguments.max_rows, cache)
        held_out = read_split(arguments.corpus, arguments.pair, "validation", 1000, cache)
    log.info("%s: %s pairs", arguments.corpus, f"{len(texts):,}")
    tokenizer = train_tokenizer((arguments.prompt + texts["source"]).tolist() + texts["target"].tolist(), size.pieces)
    rows = tokenise(texts, tokenizer, arguments.prompt, size).filter(lambda row: not row["truncated"])
    held_out_rows = tokenise(held_out, tokenizer, arguments.prompt, size)
    model = make_model(size, len(tokenizer))
    log.info("%s pieces, %s parameters", f"{len(tokenizer):,}", f"{model.num_parameters():,}")
    train(model, rows, size, epochs=arguments.epochs, minutes=arguments.minutes, seed=arguments.seed)

    loss = loss_meter(model)(held_out_rows, 64)
    log.info("validation loss %.4f", loss)
    examples = held_out["source"][:5].tolist()
    for source, translation in zip(
        examples, translate(model, tokenizer, examples, prompt=arguments.prompt, max_new_tokens=48), strict=True
    ):
        log.info("%s -> %s", source, translation)
    save_model(model, tokenizer, arguments.output)
    readme = README.format(
        size=arguments.size.capitalize(),
        pair=arguments.pair,
        rows=len(texts),
        parameters=model.num_parameters(),
        pieces=len(tokenizer),
        loss=loss,
        prompt=arguments.prompt,
    )
    (arguments.output / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
