"""The tokenizer of a run: the base model's, and for the characters of the target language that it lacks, new pieces.

A vocabulary made for other languages may lack letters of the target's: they become the unknown token, and no training
brings them back. A base model's embedding usually has more rows than its vocabulary has pieces (FLAN-T5: 32,128 for
32,100), and each spare row can hold a character. `extend` gives the fast tokenizer those pieces, so that whoever loads
it needs nothing special, and says from which row each new one starts:

    TOKENIZER/...              a from_pretrained directory of the extended tokenizer
    TOKENIZER/extension.json   [{"char": "í", "id": 32100, "like": 23}, ...]

It works on `tokenizer.json` (Unigram, as all T5 tokenizers are), without TensorFlow or the weights.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from tasks import artifacts
from tasks.errors import DataError
from tasks.storage import Store

EXTENSION = "extension.json"
# The characters whose form an untouched tokenizer would change are carried past its normaliser as private-use ones.
CARRIERS = 0xF0000
ALIKE = {"¿": "?", "¡": "!", "«": '"', "»": '"', "“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-"}


class Choice(NamedTuple):
    """The missing characters that get a row of their own, and how often those occur for which no row is left."""

    added: list[str]
    left_out: dict[str, int]


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a model directory. Raises `DataError` when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{directory} has no tokenizer that transformers can read: {error}") from error


def fetch_tokenizer(store: Store, model_key: str, scratch: Path) -> Any:
    """The tokenizer of a model in the store; its weights stay there."""
    directory = scratch / "base-tokenizer"
    artifacts.fetch(store, model_key, directory, wanted=lambda path: not path.endswith(".safetensors"))
    return load_tokenizer(directory)


def embedding_rows(store: Store, model_key: str) -> int:
    """How many pieces a model in the store has vectors for; its tokenizer may have fewer."""
    return int(store.get_json(f"{model_key}/config.json")["vocab_size"])


def lacks(tokenizer: Any, character: str) -> bool:
    """Whether the character does not come back as it was: unknown, or normalised to something else."""
    ids = tokenizer(character, add_special_tokens=False)["input_ids"]
    return tokenizer.unk_token_id in ids or tokenizer.decode(ids, clean_up_tokenization_spaces=False) != character


def choose(tokenizer: Any, counts: Mapping[str, int], embedding_rows: int) -> Choice:
    """Of the characters that the tokenizer lacks, the most frequent ones, as many as the embedding has spare rows."""
    lacking = [char for char in counts if not char.isspace() and lacks(tokenizer, char)]
    lacking.sort(key=lambda char: (-counts[char], char))
    spare = max(0, embedding_rows - len(tokenizer)) if _unigram(tokenizer) else 0
    usable = [char for char in lacking if char != "▁"][:spare]  # the sign that stands for a space in every piece
    # In the order of their code points: when only their frequencies change, the same character keeps its row.
    return Choice(sorted(usable), {char: counts[char] for char in lacking if char not in usable})


def extend(tokenizer: Any, characters: list[str], directory: Path) -> list[dict[str, Any]]:
    """Save the tokenizer with a piece for each of the characters to `directory`, and say which rows they start from.

    Returns a row a character, also written as `extension.json`: `char`, `id` of its new row, and `like`, the id of the
    piece that it resembles (its base letter), or else of the unknown token, as which the model has known it so far.
    """
    tokenizer.clean_up_tokenization_spaces = False  # or decoding would take spaces away that were in the text
    tokenizer.save_pretrained(str(directory))
    # What a tokenizer without these pieces would be made from.
    for slow in ("spiece.model", "sentencepiece.bpe.model"):
        (directory / slow).unlink(missing_ok=True)
    extension: list[dict[str, Any]] = []
    if characters:
        path = directory / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        pieces = content["model"]["vocab"]
        lowest = min(score for _, score in pieces)  # not lower, or every unknown character would cost more than now
        # A piece's id is its place in the list: special tokens that are not in it come first.
        pieces += [[tokenizer.convert_ids_to_tokens(i), 0.0] for i in range(len(pieces), len(tokenizer))]
        for char in characters:
            extension.append({"char": char, "id": len(pieces), "like": _resembled(tokenizer, char)})
            pieces.append([char, lowest])
        changed = [char for char in characters if normalised(tokenizer, char) != char]
        content["normalizer"] = _around(content["normalizer"], changed)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (directory / EXTENSION).write_text(json.dumps(extension, ensure_ascii=False, indent=1), encoding="utf-8")
    return extension


def normalised(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer's own normaliser leaves it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


def _unigram(tokenizer: Any) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"


def _resembled(tokenizer: Any, character: str) -> int:
    base = ALIKE.get(character) or unicodedata.normalize("NFKD", character)[0]
    return int(tokenizer.convert_tokens_to_ids(base))  # the unknown token's for what is no piece


def _around(normalizer: dict[str, Any] | None, characters: list[str]) -> dict[str, Any] | None:
    """The normaliser as JSON, made to leave the characters alone: they are exchanged before it and back after it."""
    if not characters:
        return normalizer
    carried = [(char, chr(CARRIERS + place)) for place, char in enumerate(characters)]

    def replace(old: str, new: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"String": old}, "content": new}

    before, after = [replace(c, carrier) for c, carrier in carried], [replace(carrier, c) for c, carrier in carried]
    return {"type": "Sequence", "normalizers": [*before, *([normalizer] if normalizer else []), *after]}
