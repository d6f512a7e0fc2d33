"""How long training takes beside the reference notebook's way: the same pairs, model size, epochs and machine.

    python benchmarks/train.py --corpus DIR --examples 128 256

The model has FLAN-T5 small's dimensions and random weights, with embedding, encoder and decoder frozen; pairs are those
of a corpus in the layout of Helsinki-NLP/opus-100, cut into pieces of a vocabulary that is made for the benchmark. Each
way is a process of its own, so that its peak memory is its own, and the ways take turns, so that noise hits all alike.
Times begin with the first batch and end with the last epoch's validation; tracing and, where there is one, the trunk's
run are in them.

    notebook     everything padded to 128, model.fit, loss over all positions
    buckets      training.decoder_states: off   batches of similar lengths, logits at targets only
    cached       training.decoder_states: run   the trunk once, then the head alone; float32 and bfloat16
    next week    training.decoder_states: store, and 5% of the pairs are new

Prints a table with ratios first. CPU seconds are what the CPUs worked for the process, which other work on the machine
disturbs less than seconds on the wall; trunk, epoch and bare products are in them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BATCH, WIDTH, RATE = 64, 128, 1e-3
WAYS = {
    "notebook": {},
    "buckets, float32": {"precision": "float32", "decoder_states": "off"},
    "cached, float32": {"precision": "float32", "decoder_states": "run"},
    "cached, bfloat16": {"precision": "bfloat16", "decoder_states": "run"},
    "next week, bfloat16": {"precision": "bfloat16", "decoder_states": "store"},
}


class Clock:
    """Seconds since it was made: by the clock on the wall, and of work that the CPUs did for this process."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both."""
        return {"seconds": time.monotonic() - self.wall, "cpu": time.process_time() - self.cpu}


def prepare(corpus: str, examples: int, directory: Path) -> dict[str, float]:
    """Write the model and the tokenised pairs; returns their mean lengths."""
    from datasets import DatasetDict
    from transformers import T5Config

    from examples.make_base_model import PROMPT, SIZES, read_split, tokenise, train_tokenizer
    from tasks.model import new_model, save_model, tf

    with tempfile.TemporaryDirectory() as cache:
        texts = read_split(corpus, "en-es", "train", None, cache)
    few = texts[:: max(1, len(texts) // 5000)]
    tokenizer = train_tokenizer((PROMPT + few["source"]).tolist() + few["target"].tolist(), 4000)
    # The corpus is sorted by origin: rows from all over it. 5% more than asked for, the pairs of next week.
    chosen = texts.sample(int(examples * 1.05) + 32, random_state=0).reset_index(drop=True)
    size = replace(SIZES["small"], max_tokens=WIDTH)
    splits = {"validation": chosen[:32], "train": chosen[32:]}
    rows = DatasetDict({name: tokenise(table, tokenizer, PROMPT, size) for name, table in splits.items()})
    rows.save_to_disk(directory / "pairs")
    tf.keras.utils.set_random_seed(0)
    model = new_model(
        T5Config(
            vocab_size=32128,
            d_model=512,
            d_kv=64,
            d_ff=1024,
            num_layers=8,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )
    save_model(model, tokenizer, directory / "model")
    return {name: float(np.mean([len(row) for row in rows["train"][name]])) for name in ("input_ids", "labels")}


def notebook(directory: Path, examples: int, epochs: int) -> dict[str, Any]:
    """As the notebook does it: pad to 128, `model.fit`."""
    from datasets import DatasetDict

    from tasks.model import load_model, tf
    from tasks.training.loss import loss_meter

    rows = DatasetDict.load_from_disk(directory / "pairs")
    model = load_model(directory / "model")
    for layer in model.layers[:3]:
        layer.trainable = False

    def padded(split: Any) -> Any:
        ids, labels = (np.zeros([len(split), WIDTH], np.int32) for _ in range(2))
        for row, (source, target) in enumerate(zip(split["input_ids"], split["labels"], strict=True)):
            ids[row, : len(source)], labels[row, : len(target)] = source, target
        return tf.data.Dataset.from_tensor_slices(
            {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32), "labels": labels}
        )

    model.compile(optimizer=tf.keras.optimizers.Adam(RATE))
    train = padded(rows["train"].select(range(examples))).shuffle(examples, seed=0).batch(BATCH).prefetch(2)
    clock = Clock()
    model.fit(train, validation_data=padded(rows["validation"]).batch(BATCH), epochs=epochs, verbose=0)
    return {**clock.read(), "loss": loss_meter(model)(rows["validation"], BATCH)}


def ours(directory: Path, examples: int, epochs: int, settings: dict[str, Any]) -> dict[str, Any]:
    """As the train step does it."""
    from datasets import DatasetDict

    from tasks.model import load_model
    from tasks.settings import Training
    from tasks.storage import Store
    from tasks.training.decoder_states import Keep, with_states
    from tasks.training.devices import Devices
    from tasks.training.fit import Trainer
    from tasks.training.freezing import freeze
    from tasks.training.loss import loss_meter
    from tasks.training.pairs import Pairs

    training = Training(epochs=epochs, batch_size=BATCH, learning_rate=RATE, **settings)
    rows = DatasetDict.load_from_disk(directory / "pairs")
    first = examples // 20 if training.decoder_states == "store" else 0

    def pairs(start: int) -> dict[str, Pairs]:
        return {
            "train": Pairs.of(rows["train"].select(range(start, start + examples))),
            "validation": Pairs.of(rows["validation"]),
        }

    devices = Devices()
    model = load_model(directory / "model", training.precision)
    learning = freeze(model, training)
    found: dict[str, Any] = {}

    def trunk(splits: dict[str, Pairs], name: str, keep: Keep | None) -> dict[str, Pairs]:
        clock = Clock()
        with_them = with_states(
            model, splits, directory / name, devices, precision=training.precision, batch_size=BATCH, keep=keep
        )
        found["trunk"] = clock.read()["cpu"]
        return dict(with_them)

    splits = pairs(first)
    if first:  # last week's run, before the clock starts
        keep = Keep(Store(os.environ["RETRAIN_BUCKET"]), f"decoder-states/{directory.name}")
        trunk(pairs(0), "last-week", keep)
        found["first trunk"] = found["trunk"]
    clock = Clock()
    if training.decoder_states != "off":
        splits = trunk(splits, f"states-{os.getpid()}", keep if first else None)
    trainer = Trainer(model, learning, **splits, settings=training, devices=devices)
    begins: list[float] = []
    batches = trainer._batches

    def timed() -> Any:
        begins.append(time.process_time())
        yield from batches()
        begins.append(time.process_time())

    trainer._batches = timed  # type: ignore[method-assign]
    trainer.fit()
    found.update(clock.read())
    found["epoch"], found["peak"] = begins[-1] - begins[-2], peak()  # before what only the benchmark does
    if training.decoder_states != "off":
        found["bare products"] = bare_products(splits["train"], model, training)
    found["loss"] = loss_meter(model)(rows["validation"], BATCH)
    return found


def peak() -> float:
    """The most memory that this process has had so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def bare_products(pairs: Any, model: Any, training: Any) -> float:
    """CPU seconds for the two matrix products that an epoch of the head cannot do without, and nothing else."""
    from tasks.model import tf

    dtype = tf.as_dtype(training.precision)
    kernel = tf.cast(model.lm_head.kernel, dtype)

    @tf.function(input_signature=[tf.TensorSpec([None, None], dtype), tf.TensorSpec([None, None], dtype)])
    def products(states: Any, errors: Any) -> tuple[Any, Any]:
        return tf.matmul(states, kernel), tf.matmul(states, errors, transpose_a=True)

    seconds = 0.0
    for rows in pairs.shuffled(BATCH, 1):
        states = tf.random.normal([pairs.targets(rows), kernel.shape[0]])
        states, errors = tf.cast(states, dtype), tf.zeros([len(states), kernel.shape[1]], dtype)
        if not seconds:
            products(states, errors)
        clock = Clock()
        [value[0, 0].numpy() for value in products(states, errors)]
        seconds += clock.read()["cpu"]
    return seconds


def measure(way: str, directory: Path, examples: int, epochs: int) -> dict[str, Any]:
    """One way, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--directory", str(directory), "--examples", str(examples)]
    command += ["--epochs", str(epochs)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{way}: {ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a corpus in the layout of Helsinki-NLP/opus-100")
    parser.add_argument("--examples", type=int, nargs="+", default=[128, 256], help="training pairs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1, help="the least time of so many counts")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING if arguments.way else logging.INFO, format="%(message)s")
    if arguments.way:
        count = arguments.examples[0]
        settings = WAYS[arguments.way]
        sizes = arguments.directory, count, arguments.epochs
        found = ours(*sizes, settings) if settings else notebook(*sizes)
        found.setdefault("peak", peak())
        print(json.dumps(found))
        return
    for count in arguments.examples:
        with tempfile.TemporaryDirectory() as name:
            lengths = prepare(arguments.corpus, count, Path(name))
            best: dict[str, dict[str, Any]] = {}
            for _ in range(arguments.rounds):
                for way in arguments.ways:
                    if "week" in way and "RETRAIN_BUCKET" not in os.environ:
                        continue
                    found = measure(way, Path(name), count, arguments.epochs)
                    logging.info("%s: %s", way, found)
                    if way not in best or found["seconds"] < best[way]["seconds"]:
                        best[way] = found
        mean = " and ".join(f"{value:.1f}" for value in lengths.values())
        print(f"\n{count:,} pairs, {mean} input and target tokens on average, {os.cpu_count()} CPUs")
        print(f"epochs: {arguments.epochs}\n")
        columns = ["way", "times as fast", "... in CPU seconds", "seconds", "CPU seconds", "trunk", "last epoch"]
        print(f"| {' | '.join([*columns, '/ bare products', 'peak GB', 'held-out loss'])} |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        reference = best.get("notebook", {"seconds": float("nan"), "cpu": float("nan")})
        for way, found in best.items():
            trunk = f"{found['trunk']:.1f} s" if "trunk" in found else ""
            if "first trunk" in found:
                trunk += f" ({found['trunk'] / found['first trunk']:.0%} of the first)"
            epoch = f"{found['epoch']:.1f} s" if "epoch" in found else ""
            bare = f"{found['epoch'] / found['bare products']:.2f}" if "bare products" in found else ""
            print(
                f"| {way} | {reference['seconds'] / found['seconds']:.1f} | {reference['cpu'] / found['cpu']:.1f} | "
                f"{found['seconds']:.1f} | {found['cpu']:.1f} | {trunk} | {epoch} | {bare} | "
                f"{found['peak']:.1f} | {found['loss']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
