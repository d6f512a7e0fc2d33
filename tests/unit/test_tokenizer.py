"""Characters that a tokenizer lacks get pieces of their own, and then every sentence comes back as it was.

And many texts become ids word by word, which are those that the tokenizer gives for each text as a whole.
"""

from __future__ import annotations

import json
import random
import string
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5TokenizerFast

from tasks.data import encoding
from tasks.data.encoding import ALONE, Encoder, by_words, finish
from tasks.data.tokenizer import EXTENSION, Choice, choose, extend, lacks, load_tokenizer
from tasks.errors import DataError

# What a T5 made for English, French and German may know, and what a Spanish corpus holds beside it.
KNOWN = string.ascii_letters + string.digits + ".,;:?!'\"()-éóáèàâçüöäß"
MISSING = "íúñ¿¡ÁÉÍÓÚÑÜ«»{}~`<>\\…ºªЖ漢→"
SPARE = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer as T5's: SentencePiece's Unigram, its NFKC normaliser, a hundred sentinels, no byte fallback."""
    folder = tmp_path_factory.mktemp("base")
    random.seed(0)
    words = ["".join(random.choices(KNOWN, k=random.randint(1, 5))) for _ in range(3000)]  # noqa: S311
    texts = [" ".join(random.choices(words, k=8)) for _ in range(2000)]  # noqa: S311
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), model_type="unigram", vocab_size=400,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", required_chars=KNOWN,
        minloglevel=2,
    )  # fmt: skip
    T5TokenizerFast(str(folder / "spiece.model"), extra_ids=100).save_pretrained(str(folder))
    assert (folder / "spiece.model").exists()
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def extended(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with all that it lacked."""
    folder = tmp_path_factory.mktemp("extended")
    chosen = choose(base, Counter(KNOWN + MISSING), len(base) + SPARE)
    extend(base, chosen.added, folder)
    return load_tokenizer(folder)


def round_trip(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True))


def test_such_a_tokenizer_loses_spanish_characters(base: Any) -> None:
    assert "í" not in round_trip(base, "María")
    assert round_trip(base, "1.º") == "1.o"  # as harmful: other characters in their place
    assert all(lacks(base, char) for char in MISSING)
    assert not any(lacks(base, char) for char in KNOWN)


def test_what_is_lacking_is_chosen_by_frequency_and_what_finds_no_row_is_counted(base: Any) -> None:
    counts = Counter({"í": 50, "ñ": 40, "a": 900, "¿": 30, "Ж": 2, "漢": 1, " ": 200})
    assert choose(base, counts, len(base) + 3) == Choice(sorted("íñ¿"), {"Ж": 2, "漢": 1})
    assert choose(base, counts, len(base)).added == []
    assert choose(base, counts, len(base) + 28).left_out == {}


def test_only_the_set_of_characters_decides_their_rows(base: Any) -> None:
    """Or a promoted model and the next candidate would give one character two rows because of a few more sentences."""
    one, two = Counter({"í": 5, "ñ": 4}), Counter({"í": 4, "ñ": 5})
    assert choose(base, one, len(base) + 9) == choose(base, two, len(base) + 9)


def test_new_pieces_follow_the_old_ones_and_start_from_their_base_letter(base: Any, tmp_path: Path) -> None:
    extension = extend(base, ["¿", "í", "漢"], tmp_path)
    extended = load_tokenizer(tmp_path)
    assert [row["id"] for row in extension] == [len(base), len(base) + 1, len(base) + 2]
    assert [row["like"] for row in extension] == [*base.convert_tokens_to_ids(["?", "i"]), base.unk_token_id]
    assert extended.convert_ids_to_tokens([row["id"] for row in extension]) == ["¿", "í", "漢"]
    assert json.loads((tmp_path / EXTENSION).read_text()) == extension
    assert not (tmp_path / "spiece.model").exists()  # of which a tokenizer without the new pieces could be made


def test_all_that_the_base_could_say_it_says_as_before(base: Any, extended: Any) -> None:
    for text in ("Hello, world.", "<extra_id_0> said: <extra_id_99>", "caf\u00e9 (2)", ""):
        assert extended(text)["input_ids"] == base(text)["input_ids"]
    assert [extended.convert_ids_to_tokens(i) for i in range(len(base))] == base.convert_ids_to_tokens(
        list(range(len(base)))
    )


def test_nothing_lacking_leaves_the_tokenizer_as_it_is(base: Any, tmp_path: Path) -> None:
    assert extend(base, [], tmp_path) == []
    assert json.loads((tmp_path / EXTENSION).read_text()) == []
    assert load_tokenizer(tmp_path).get_vocab() == base.get_vocab()


@given(st.text(st.sampled_from(KNOWN + MISSING + " "), max_size=60))
def test_every_sentence_of_the_alphabet_comes_back_as_it_was(extended: Any, text: str) -> None:
    text = " ".join(unicodedata.normalize("NFC", text).split())
    assert round_trip(extended, text) == text
    assert extended.unk_token_id not in extended(text)["input_ids"]


@pytest.fixture(scope="module")
def tokenizers(base: Any, extended: Any) -> list[Any]:
    """T5's as they are published, which split at white space first, with and without characters of ours; and others."""
    published = []
    for each in (base, extended):
        tokenizer = library.Tokenizer.from_str(each.backend_tokenizer.to_str())
        split = library.pre_tokenizers
        tokenizer.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace(prepend_scheme="always")])
        published.append(tokenizer)
    demo = load_tokenizer(Path(__file__).parents[2] / "examples" / "demo" / "base-model")
    return [*published, *(each.backend_tokenizer for each in (demo, base, extended))]


def as_a_whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def word_by_word(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = Encoder(tokenizer)(pa.array(texts, pa.string())).to_pylist()
    return ids


def test_each_character_that_may_stand_alone_does(tokenizers: list[Any]) -> None:
    """Beside any other, at the beginning, in the middle and at the end of a word."""
    characters = [chr(code) for code in range(0x3000) if ALONE.fullmatch(chr(code))]
    assert set("aZ0.<ñÁ¿º«…—Ωя") < set(characters)
    assert not set(" \u00a0\u00a8\u0301\u2581") & set(characters)
    texts = [f"x {char}x x{char} {char} {char * 2} x" for char in characters]
    assert list(map(by_words, tokenizers)) == [True] * 3 + [False] * 2  # of which no word is the same at the beginning
    for tokenizer in tokenizers:
        assert word_by_word(tokenizer, texts) == as_a_whole(tokenizer, texts)


# Among others what joins its neighbour (marks, joiners, a prepended sign), what becomes a space (¨), the piece that
# stands for a space, and special tokens.
awkward = st.sampled_from([*" \u0301\u200d\u0600¨▁\u00a0\t", "</s>", "<extra_id_7>", "<unk", "  ", "x\u0308", "ﬁ", "½"])
awkward_text = st.lists(awkward | st.sampled_from(KNOWN + MISSING) | st.characters(), max_size=20).map("".join)


@given(texts=st.lists(awkward_text, max_size=6), which=st.integers(0, 4))
def test_texts_are_encoded_as_the_tokenizer_does(texts: list[str], which: int, tokenizers: list[Any]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    assert word_by_word(tokenizers[which], texts) == as_a_whole(tokenizers[which], texts)


def test_words_that_are_forgotten_are_looked_at_again(tokenizers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MOST_WORDS", 2)
    encoder = Encoder(tokenizers[0])
    for texts in (["one two three", "two"], ["three four", "one"], ["two two", ""]):
        assert encoder(pa.array(texts)).to_pylist() == as_a_whole(tokenizers[0], texts)


def test_a_tokenizer_that_looks_beyond_words_gets_whole_texts() -> None:
    texts = ["one two  three", " one", "two three", ""]
    of_bytes = library.ByteLevelBPETokenizer()
    of_bytes.train_from_iterator(texts * 9, vocab_size=300, special_tokens=["</s>"])
    tokenizer = library.Tokenizer.from_str(of_bytes.to_str())
    ending = library.processors.TemplateProcessing
    tokenizer.post_processor = ending("$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))])
    assert not by_words(tokenizer)
    assert word_by_word(tokenizer, texts) == as_a_whole(tokenizer, texts)
    tokenizer.post_processor = ending("$A", special_tokens=[])
    with pytest.raises(DataError, match=r"the tokenizer adds the tokens \[\] to a text: expected one end token"):
        Encoder(tokenizer)


@given(st.lists(st.lists(st.integers(3, 99), max_size=12), max_size=8), st.integers(2, 12))
def test_what_is_too_long_is_cut_and_keeps_its_end_token(ids: list[list[int]], longest: int) -> None:
    finished, cut = finish(pa.array(ids, encoding.IDS), 1, longest)
    assert finished.to_pylist() == [[*text[: longest - 1], 1] for text in ids]
    assert cut.tolist() == [len(text) + 1 > longest for text in ids]
