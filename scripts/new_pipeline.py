"""Write a pipeline's file for a language pair: `make new-pipeline PAIR=en-fr`, or

    python -m scripts.new_pipeline en-fr

The file is commented, valid as it is, and has a time of its own, so that not every pipeline asks for the GPU at once.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

from plugins.pipelines import dag_id
from tasks.errors import SettingsError
from tasks.settings import load

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi", "it": "Italian",
    "ja": "Japanese", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip

TEMPLATE = """\
# {source_name} to {target_name}: FLAN-T5 base on OPUS-100. What each setting means: `python -m tasks settings`.
# Before its first run, make the data known: does the source have the pair, and what does validation say of it?
name: {pair}
description: FLAN-T5 base on OPUS-100, {source_name} to {target_name}
schedule: "{minute} {hour} * * {day}"  # UTC; made from the name, so that the pipelines do not all start at once

# approval: human  # a person decides what the gate would promote

operation:
  priority: 5  # which pipeline gets the GPU first; 10 goes before 1
  # alert_emails: [team@example.com]  # through the Airflow connection smtp_default
  # alert_webhook: retrain_alerts     # an Airflow connection: docs/operations.md

data:
  source: Helsinki-NLP/opus-100  # or a directory, or an s3:// mirror
  revision: 805090dc28bf78897da9641cdf08b61287580df9  # pinned: a run can be repeated
  pair: {pair}

base_model:
  source: google/flan-t5-base
  revision: 7bcac572ce56db69c1ea7c8af255c5d7c9672fc2

validation:
  min_train_rows: 100000
  min_eval_rows: 1000
  max_unknown_rate: 0.05  # FLAN-T5 lacks characters of many languages: look at what the first run says
  max_row_change: 0.5  # how far a run's data may be from production's: these four
  max_length_drift: 0.2
  max_language_drift: 0.05
  max_trigram_drift: 0.3

preprocessing:
  prompt: "translate {source_name} to {target_name}: "
  max_tokens: 128

training:
  epochs: 3
  learning_rate: 3.0e-5
  batch_size: 64

# A limit that is not set refuses. These are a start; docs/gate.md says how to choose them.
gate:
  max_validation_loss: 3.0
  validation_loss_margin: 0.01
  min_bleu: 10
  non_inferiority_margin: 0.3
  min_gain: 0.0
  min_length_ratio: 0.8
  max_length_ratio: 1.25
  max_empty: 0.005
  max_copied: 0.02
  max_repeating: 0.01
  max_unknown: 0.001
  max_slice_loss: 0.5
  max_leak: 0.05
"""


def write(pair: str, folder: Path) -> Path:
    """Write the file, and return its path. Raises `SettingsError` for what is no pair, or is there already."""
    if not re.fullmatch(r"[a-z]{2,3}-[a-z]{2,3}", pair):
        raise SettingsError(f"PAIR={pair}: expected two languages, as en-fr")
    path = folder / f"{pair}.yaml"
    source, target = pair.split("-")
    minute, hour, day = when(pair)
    text = TEMPLATE.format(
        pair=pair,
        source_name=LANGUAGES.get(source, source),
        target_name=LANGUAGES.get(target, target),
        minute=minute,
        hour=hour,
        day=day,
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SettingsError(f"{path} is there already") from None
    load(path)
    return path


def when(name: str) -> tuple[int, int, int]:
    """A minute, hour and day of the week, always the same for a name, and spread over the week."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    number, minute = divmod(number, 60)
    number, hour = divmod(number, 24)
    return minute, hour, number % 7


def main(pair: str) -> int:
    """Write the file of a pair; returns the exit code."""
    try:
        path = write(pair, ROOT / "config")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{path.relative_to(ROOT)} is written and valid: look through it. Airflow shows {dag_id(path.stem)} soon.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) == 2 else ""))
