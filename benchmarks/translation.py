"""How long the test split takes to translate: one sentence at a time, as the notebook did, and as evaluate does.

    python benchmarks/translation.py                                     # FLAN-T5 small's dimensions, random weights
    python benchmarks/translation.py --model MODEL --corpus CORPUS       # a trained model, the test split of a corpus

Every way translates the same sentences greedily, and the outputs of each are compared with the first way's. Random
weights never choose the end token, so every output has the full length, as long ones of a trained model do; a trained
model shows what a run gains. One sentence at a time is measured on some of the sentences, spread over all lengths.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import tensorflow as tf
from transformers import T5Config

from tasks.data.tokenizer import load_tokenizer
from tasks.judging import ctranslate
from tasks.judging.examine import agreement, spread
from tasks.judging.translation import encode, generate, padded, until_end
from tasks.model import length_batches, load_model, new_model, save_model

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
PROMPT = "translate English to Spanish: "
FLAN_T5_SMALL = {
    "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False, "decoder_start_token_id": 0, "vocab_size": 32128,
}  # fmt: skip


def main() -> None:
    """Translate in each way, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a from_pretrained directory")
    parser.add_argument("--corpus", type=Path, default=DEMO / "corpus", help="a corpus in the hub's layout")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--alone", type=int, default=16, help="how many of them one at a time")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        directory = arguments.model or Path(name)
        tokenizer = load_tokenizer(arguments.model or DEMO / "base-model")
        if arguments.model is None:
            tf.keras.utils.set_random_seed(0)
            save_model(new_model(T5Config(**FLAN_T5_SMALL)), tokenizer, directory)
        model = load_model(directory)
        translators = {precision: ctranslate.load(directory, tokenizer, precision) for precision in ("float32", "int8")}

    test = pd.concat(map(pd.read_parquet, sorted(arguments.corpus.rglob("test*.parquet"))))
    texts = [pair["en"] for pair in test["translation"].head(arguments.sentences)]
    sources = encode(tokenizer, texts, PROMPT, 128)
    few = spread([len(source) for source in sources], arguments.alone)
    search = {"max_new_tokens": arguments.max_new_tokens, "batch_size": arguments.batch_size}

    def eager(rows: list[list[int]], batch_size: int) -> list[list[int]]:
        outputs: list[list[int]] = [[]] * len(rows)
        for batch in length_batches([len(row) for row in rows], batch_size):
            ids = padded([rows[i] for i in batch], 0)
            answers = model.generate(
                input_ids=tf.constant(ids),
                attention_mask=tf.constant((ids != 0).astype(np.int32)),
                max_new_tokens=arguments.max_new_tokens,
                num_beams=1,
                do_sample=False,
            ).numpy()
            for i, answer in zip(batch, answers, strict=True):
                outputs[i] = until_end(answer[1:].tolist(), model.config)
        return outputs

    ways: dict[str, Callable[[], list[list[int]]]] = {
        "sorted batches, eager": lambda: eager(sources, arguments.batch_size),
        "evaluate, one graph": lambda: generate(model, sources, xla=False, **search),
        "evaluate, XLA": lambda: generate(model, sources, xla=True, **search),
        **{
            f"CTranslate2, {precision}": functools.partial(
                ctranslate.generate, translator, tokenizer, sources, beams=1, **search
            )
            for precision, translator in translators.items()
        },
    }
    started = time.monotonic()
    alone = eager([sources[i] for i in few], 1)
    each = (time.monotonic() - started) / len(few)
    print(f"{len(sources)} sentences, {model.num_parameters():,} parameters, {os.cpu_count()} CPUs")
    print("| way | sentences/s | times as fast | as one at a time |\n|---|---:|---:|---:|")
    print(f"| one sentence at a time | {1 / each:.2f} | 1 | |", flush=True)
    for label, way in ways.items():
        started = time.monotonic()
        outputs = way()
        seconds = time.monotonic() - started
        alike = agreement(alone, [outputs[i] for i in few])
        speed = each * len(sources) / seconds
        print(f"| {label} | {len(sources) / seconds:.1f} | {speed:.0f} | {alike:.0%} |", flush=True)


if __name__ == "__main__":
    main()
