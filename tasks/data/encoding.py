"""Token ids of many texts, and of pairs as they are trained on."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from tasks.data.text import normalise
from tasks.errors import DataError

IDS = pa.list_(pa.int32())
SIDES = ("source", "target")
SCHEMA = pa.schema([("source", pa.string()), ("target", pa.string()), ("input_ids", IDS), ("labels", IDS)])
MOST_WORDS = 200_000  # that are remembered
# Words of which each character stays what it is, or becomes others that are no spaces, whatever its neighbours are:
# printable ASCII, Latin, Greek and Cyrillic letters, and some signs. No combining marks, nothing like a space.
ALONE = re.compile("[!-~¡-§©-¬®°-³µ-·¹-ʯΆ-Ͽ\u0400-\u0481\u048a-\u04ff–—…€]+")


class Encoder:
    """What a tokenizer makes of texts, at a fraction of its time.

    T5's tokenizers look at words one by one, and languages repeat their words: each is given to the tokenizer once, and
    texts are put together from that. Where this might not be the same, the tokenizer gets the whole text: when it works
    in another way, and for a text with a word that is not all of `ALONE`, or has one of the added tokens in it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `DataError` for a tokenizer that does not just put one end token after a text."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = tokenizer.encode("").ids
        if len(special) != 1:
            raise DataError(f"the tokenizer adds the tokens {special} to a text: expected one end token, as T5's do")
        self.end = special[0]
        self._tokenizer = tokenizer
        self._by_words = by_words(tokenizer)
        self._added = re.compile("|".join(re.escape(t.content) for t in tokenizer.get_added_tokens_decoder().values()))
        self._ids: dict[str, list[int] | None] = {}

    def __call__(self, texts: pa.Array) -> pa.ListArray:
        """The ids of each text (none is null), without the end token."""
        words = pc.split_pattern(texts, " ")
        distinct = words.values.dictionary_encode()
        pieces = self._look_up(distinct.dictionary.to_pylist())
        numbers, offsets = distinct.indices.to_numpy(), words.offsets.to_numpy()
        alone = np.array([ids is not None for ids in pieces], bool)
        whole = ~np.logical_and.reduceat(alone[numbers], offsets[:-1]) if len(texts) else np.zeros(0, bool)
        if whole.any():  # such a text is one piece, in the place of its first word
            firsts, kept = offsets[:-1][whole], ~np.repeat(whole, np.diff(offsets))
            numbers, kept[firsts] = numbers.copy(), True
            numbers[firsts] = len(pieces) + np.arange(len(firsts))
            pieces += self._encode(texts.filter(pa.array(whole)).to_pylist())
            numbers, offsets = numbers[kept], np.concatenate([[0], np.cumsum(kept)])[offsets]
        taken = pa.array(pieces, IDS).take(pa.array(numbers))
        return pa.ListArray.from_arrays(taken.offsets.take(pa.array(offsets)), taken.values)

    def _look_up(self, words: list[str]) -> list[list[int] | None]:
        """The ids of words; None of those that may depend on their neighbours."""
        if len(self._ids) > MOST_WORDS:
            self._ids.clear()
        new = [word for word in words if word not in self._ids]
        alone = [word for word in new if self._stands_alone(word)]
        self._ids.update(dict.fromkeys(new))
        self._ids.update(zip(alone, self._encode(alone), strict=True))
        return [self._ids[word] for word in words]

    def _stands_alone(self, word: str) -> bool:
        return self._by_words and ALONE.fullmatch(word) is not None and not self._added.search(word)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def by_words(tokenizer: Tokenizer) -> bool:
    """Whether what the tokenizer makes of a word (of `ALONE`) surely does not depend on the words around it."""

    def parts(component: Any) -> list[dict[str, Any]]:
        return flat(json.loads(component.__getstate__())) if component else []

    def flat(part: dict[str, Any]) -> list[dict[str, Any]]:
        inner = part.get("pretokenizers", part.get("normalizers"))
        return [part] if inner is None else [each for one in inner for each in flat(one)]

    def is_local(part: dict[str, Any]) -> bool:
        if part["type"] == "Replace":  # of spaces, of which there are none too many, or of one character by others
            one = len(part["pattern"].get("String", "")) == 1 and part["content"] and not set(part["content"]) & {*" ▁"}
            return part["pattern"].get("Regex") in {" {2,}", r"\s+"} or bool(one)
        return part["type"] in {"Precompiled", "NFC", "NFKC", "Strip"}

    splits = parts(tokenizer.pre_tokenizer)
    last = splits[-1] if splits else {}
    return (
        type(tokenizer.model).__name__ == "Unigram"
        and last.get("type") == "Metaspace"
        and last["prepend_scheme"] == "always"
        and last["split"]
        and all(part["type"] == "WhitespaceSplit" for part in splits[:-1])
        and all(is_local(part) for part in parts(tokenizer.normalizer))
    )


def encode(texts: pa.RecordBatch, encoder: Encoder, prompt: str, max_tokens: int) -> pa.RecordBatch:
    """Token ids of pairs, unpadded: `input_ids` (prompt and source), `labels` (target); each ends in the end token.

    Beside them the normalised `source` and `target`, and `truncated`: whether a side had more than `max_tokens`.
    """
    source, target = (pa.array([normalise(t) for t in texts[side].to_pylist()], pa.string()) for side in SIDES)
    inputs, long_inputs = finish(encoder(pc.binary_join_element_wise(prompt, source, "")), encoder.end, max_tokens)
    labels, long_labels = finish(encoder(target), encoder.end, max_tokens)
    columns = [source, target, inputs, labels, pa.array(long_inputs | long_labels)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA.append(pa.field("truncated", pa.bool_())))


def finish(ids: pa.ListArray, end: int, max_tokens: int) -> tuple[pa.ListArray, np.ndarray]:
    """Lists of ids cut so that each ends in the end token and has at most `max_tokens`; and which were cut."""
    offsets, values = ids.offsets.to_numpy(), ids.values.to_numpy()
    lengths = np.diff(offsets)
    kept = np.minimum(lengths, max_tokens - 1)
    place = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    ends = np.cumsum(kept + 1)
    finished = np.full(ends[-1] if len(ends) else 0, end, np.int32)
    is_end = np.zeros(len(finished), bool)
    is_end[ends - 1] = True
    finished[~is_end] = values[place < np.repeat(kept, lengths)]
    starts = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(finished)), lengths > kept
