"""Make what the offline demo needs: its corpus, and a tiny base model that speaks the Spanish of Spain.

    python examples/demo/make_assets.py [--seed 0]

    examples/demo/corpus/       pairs in the Spanish of Latin America, see make_corpus.py
    examples/demo/base-model/   a tiny T5, trained on other pairs that are mostly in the Spanish of Spain

Both are committed, so this runs only when one of them is to change. It takes some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from make_corpus import demo_corpus, pretraining_corpus, write_corpus

HERE = Path(__file__).resolve().parent
PRETRAINING_ROWS = 50_000
AMERICAN_SHARE = 0.1
EPOCHS = 8


def main() -> None:
    """Make the corpus, then the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    write_corpus(demo_corpus(seed), HERE / "corpus")
    with tempfile.TemporaryDirectory() as directory:
        write_corpus(pretraining_corpus(seed, PRETRAINING_ROWS, AMERICAN_SHARE), Path(directory))
        command = [sys.executable, HERE.parent / "make_base_model.py", "--size", "tiny", "--corpus", directory]
        subprocess.run(
            [*command, "--epochs", str(EPOCHS), "--seed", str(seed), "--output", HERE / "base-model"], check=True
        )


if __name__ == "__main__":
    main()
