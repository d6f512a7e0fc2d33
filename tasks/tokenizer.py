"""The tokenizer that belongs to a model, without loading the model's weights or TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tasks import artifacts
from tasks.errors import DataError
from tasks.storage import Store


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a model directory. Raises `DataError` when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{directory} has no tokenizer that transformers can read: {error}") from error


def fetch_tokenizer(store: Store, model_key: str, scratch: Path) -> Any:
    """The tokenizer of a model in the store; its weights stay there."""
    directory = scratch / "tokenizer"
    artifacts.fetch(store, model_key, directory, wanted=lambda path: not path.endswith(".safetensors"))
    return load_tokenizer(directory)
