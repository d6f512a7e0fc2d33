"""Write the demo's corpus: generated English-Spanish pairs in the layout that Helsinki-NLP/opus-100 has on the hub.

Every English sentence has two translations, as in Spain (coche, ordenador, habéis comprado) and as in Latin America
(carro, computadora, compraron). The demo's base model has learnt mostly the first; the demo's corpus has the second, so
that fine-tuning has something honest to learn.

    python examples/demo/make_corpus.py [--output examples/demo/corpus] [--seed 0]

    OUTPUT/README.md                                              tells `datasets` where the splits are
    OUTPUT/en-es/{train,validation,test}-00000-of-00001.parquet   one column: translation {en, es}
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from compose import AMERICA, sentences

SIZES = {"validation": 400, "test": 500, "train": 6000}
README = """---
configs:
- config_name: en-es
  data_files:
  - split: test
    path: en-es/test-*
  - split: train
    path: en-es/train-*
  - split: validation
    path: en-es/validation-*
---
# Generated English-Spanish pairs

{train:,} / {validation:,} / {test:,} pairs (train / validation / test) that `make_corpus.py` composes from a
small grammar. They are made up: they show that the pipeline works, and say nothing of how well a model translates real
text. No normalised English or Spanish sentence is in two splits.
"""


class Pair(NamedTuple):
    """A row of a corpus."""

    en: str
    es: str


def demo_corpus(seed: int) -> dict[str, list[Pair]]:
    """The three splits, in Latin American Spanish, with a little of the dirt that real corpora have."""
    stream = sentences(seed)
    splits = {
        split: [Pair(english, spanish[AMERICA]) for english, spanish in islice(stream, size)]
        for split, size in SIZES.items()
    }
    rng = random.Random(seed)
    soil(splits["train"], rng, {"untranslated": 14, "empty": 6, "markup": 14, "misaligned": 10, "repeated": 16})
    soil(splits["validation"], rng, {"markup": 1})
    soil(splits["test"], rng, {"untranslated": 1, "markup": 1})
    return splits


def pretraining_corpus(seed: int, rows: int, american: float) -> dict[str, list[Pair]]:
    """What the base model learns from: mostly European Spanish, and no sentence of the demo's corpus in any language.

    A share is `american`, as in any corpus from the web: the model has met the words, but would rather say the others.
    The share matters: when only the head is fine-tuned, a frozen decoder has to read what the new head has written.
    """
    rng = random.Random(seed)
    stream = islice(sentences(seed), sum(SIZES.values()), None)
    sizes = {"validation": 500, "test": 500, "train": rows}
    return {
        split: [Pair(english, spanish[rng.random() < american]) for english, spanish in islice(stream, size)]
        for split, size in sizes.items()
    }


def soil(pairs: list[Pair], rng: random.Random, amounts: dict[str, int]) -> None:
    """Spoil some pairs in place, so many in each of the ways that crawled corpora are spoilt."""
    kinds = [kind for kind, amount in amounts.items() for _ in range(amount)]
    places = rng.sample(range(len(pairs)), len(kinds))
    clean = [pair for place, pair in enumerate(pairs) if place not in set(places)]
    for place, kind in zip(places, kinds, strict=True):
        pairs[place] = _spoilt(pairs[place], kind, clean, rng)


def _spoilt(pair: Pair, kind: str, clean: list[Pair], rng: random.Random) -> Pair:
    en, es = pair
    match kind:
        case "untranslated":
            return Pair(en, en)
        case "empty":
            return rng.choice((Pair(en, ""), Pair("", es)))
        case "markup":
            return rng.choice((Pair(f"<i>{en}</i>", es), Pair(en, f"&quot;{es}&quot;"), Pair(en, f"<br>{es}")))
        case "misaligned":
            return Pair(en, " ".join(other.es for other in rng.sample(clean, 15)))
        case "repeated":
            return rng.choice(clean)
    raise ValueError(kind)


def write_corpus(splits: dict[str, list[Pair]], directory: Path) -> None:
    """Write splits as the hub has them, features included."""
    (directory / "en-es").mkdir(parents=True, exist_ok=True)
    features = {"translation": {"languages": ["en", "es"], "_type": "Translation"}}
    translation = pa.struct({"en": pa.string(), "es": pa.string()})
    schema = pa.schema({"translation": translation}, {"huggingface": json.dumps({"info": {"features": features}})})
    for split, pairs in splits.items():
        table = pa.table({"translation": [pair._asdict() for pair in pairs]}, schema=schema)
        pq.write_table(table, directory / "en-es" / f"{split}-00000-of-00001.parquet", compression="zstd")
    readme = README.format(**{split: len(pairs) for split, pairs in splits.items()})
    (directory / "README.md").write_text(readme, encoding="utf-8")


def main() -> None:
    """Write the demo's corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "corpus")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    splits = demo_corpus(arguments.seed)
    write_corpus(splits, arguments.output)
    print(f"{arguments.output}: " + ", ".join(f"{len(pairs):,} {split}" for split, pairs in splits.items()))


if __name__ == "__main__":
    main()
