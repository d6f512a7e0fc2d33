"""What the unit tests of the model and of training share: the demo's tiny base model and a few pairs.

TensorFlow is imported only by the tests that ask for one of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from datasets import Dataset

BASE = Path(__file__).resolve().parents[2] / "examples" / "demo" / "base-model"
PROMPT = "translate English to Spanish: "
PAIRS = {
    "My wife has a car.": "Mi esposa tiene un carro.",
    "Where is the computer?": "¿Dónde está la computadora?",
    "They did not drink the juice this morning because it was cold.": "No bebieron el jugo esta mañana.",
    "Yes.": "Sí.",
    "The potatoes cost 10 dollars.": "Las papas cuestan 10 dólares.",
}


@pytest.fixture(scope="session")
def base() -> Path:
    """The directory of a base model of a million parameters."""
    return BASE


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    from tasks.tokenizer import load_tokenizer

    return load_tokenizer(base)


@pytest.fixture
def model(base: Path) -> Any:
    from tasks.model import load_model

    return load_model(base)


@pytest.fixture(scope="session")
def rows(tokenizer: Any) -> Dataset:
    """A few tokenised pairs of different lengths."""
    from datasets import Dataset

    encoded = {"input_ids": [PROMPT + source for source in PAIRS], "labels": list(PAIRS.values())}
    return Dataset.from_dict({name: tokenizer(texts)["input_ids"] for name, texts in encoded.items()})
