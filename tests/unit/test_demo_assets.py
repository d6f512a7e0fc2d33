"""The offline demo's corpus, generator and base model, as they are committed."""

import random
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, T5TokenizerFast

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import compose  # noqa: E402
import grammar  # noqa: E402
from make_corpus import SIZES, demo_corpus, pretraining_corpus  # noqa: E402

SEED = 0
TYPES = {".parquet", ".md", ".json", ".safetensors", ".py", ".txt"}


@pytest.fixture(scope="module")
def splits():
    return demo_corpus(SEED)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "base-model", local_files_only=True)


def texts(pairs, clean_of=lambda text: re.sub(r"<[^>]*>|&\w+;", "", text)):
    """Every normalised sentence of some pairs, without the markup that a dirty one may have."""
    return {compose.normalise(clean_of(text)) for pair in pairs for text in pair} - {""}


# --- the corpus ------------------------------------------------------------------------------------------------------


def test_the_generator_makes_what_is_committed(splits):
    for split, pairs in splits.items():
        table = pq.read_table(DEMO / "corpus" / "en-es" / f"{split}-00000-of-00001.parquet")
        assert table["translation"].to_pylist() == [pair._asdict() for pair in pairs]
    assert demo_corpus(SEED) == splits
    assert demo_corpus(SEED + 1)["test"] != splits["test"]


def test_the_corpus_loads_as_the_hub_has_it(tmp_path):
    corpus = load_dataset(str(DEMO / "corpus"), "en-es", cache_dir=str(tmp_path))
    assert {split: rows.num_rows for split, rows in corpus.items()} == SIZES
    assert corpus["train"].features["translation"].languages == ["en", "es"]


def test_no_sentence_is_in_two_splits(splits):
    train, validation, test = (texts(splits[split]) for split in ("train", "validation", "test"))
    assert not validation & test
    assert not train & (validation | test)


def test_the_base_model_never_saw_a_sentence_of_the_corpus(splits):
    seen = texts([pair for pairs in pretraining_corpus(SEED, 3000, american=0.5).values() for pair in pairs])
    assert not seen & texts([pair for pairs in splits.values() for pair in pairs])


def test_about_one_training_pair_in_a_hundred_is_dirty(splits):
    train = splits["train"]
    untranslated = sum(pair.en == pair.es for pair in train)
    empty = sum(not pair.en or not pair.es for pair in train)
    markup = sum(bool(re.search(r"<\w+>|&\w+;", pair.en + pair.es)) for pair in train)
    misaligned = sum(len(pair.es) > 6 * len(pair.en) > 0 for pair in train)
    repeated = len(train) - len(set(train))
    assert min(untranslated, empty, markup, misaligned, repeated) > 0
    assert 0.005 < (untranslated + empty + markup + misaligned + repeated) / len(train) < 0.02


def test_most_sentences_differ_between_spain_and_america():
    stream = compose.sentences(SEED)
    sample = [next(stream) for _ in range(1000)]
    assert sum(spain != america for _, (spain, america) in sample) > 650


@pytest.mark.parametrize("pattern", compose.PATTERNS, ids=lambda pattern: pattern[0])
def test_every_pattern_becomes_a_sentence(pattern, monkeypatch):
    monkeypatch.setattr(compose, "PATTERNS", [pattern])
    rng = random.Random(SEED)  # noqa: S311
    for _ in range(20):
        english, spanish = compose.compose(rng)
        for text in (english, *spanish):
            assert re.fullmatch(r"[¡¿]?[A-ZÁÉÍÓÚÑ\d][\w ,.:'¿¡-]*[.?!]", text), text
            assert not re.search(r"  | [,.?!]|[¿¡] |\b(de|a) el\b", text), text


@pytest.mark.parametrize(
    ("infinitive", "form", "persons"),
    [
        ("comer", "present", "como comes come comemos coméis comen"),
        ("fregar", "present", "friego friegas friega fregamos fregáis friegan"),
        ("conducir", "preterite", "conduje condujiste condujo condujimos condujisteis condujeron"),
        ("sacar", "preterite", "saqué sacaste sacó sacamos sacasteis sacaron"),
        ("leer", "preterite", "leí leíste leyó leímos leísteis leyeron"),
        ("hacer", "preterite", "hice hiciste hizo hicimos hicisteis hicieron"),
        ("dormir", "subjunctive", "duerma duermas duerma durmamos durmáis duerman"),
        ("apagar", "subjunctive", "apague apagues apague apaguemos apaguéis apaguen"),
        ("poder", "conditional", "podría podrías podría podríamos podríais podrían"),
    ],
)
def test_conjugation(infinitive, form, persons):
    assert [grammar.conjugate(infinitive, form, person) for person in range(6)] == persons.split()


@pytest.mark.parametrize(
    ("infinitive", "form", "person", "expected"),
    [
        ("lavarse", "perfect", 0, "me he lavado"),
        ("mudarse", "going", 3, "vamos a mudarnos"),
        ("leer", "progressive", 2, "está leyendo"),
        ("abrir", "perfect", 4, "habéis abierto"),
        ("sentarse", "imperative", 1, "siéntate"),
        ("darse", "imperative", 4, "daos"),
        ("apurarse", "imperative", 5, "apúrense"),
        ("cerrar", "imperative", 4, "cerrad"),
        ("cruzar", "imperative", 5, "crucen"),
    ],
)
def test_verb_groups(infinitive, form, person, expected):
    assert grammar.conjugate(infinitive, form, person) == expected


# --- the base model --------------------------------------------------------------------------------------------------


def test_the_assets_are_small_and_of_harmless_types():
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    assert {path.suffix for path in files} <= TYPES  # no pickle, in particular


def test_the_weights_are_in_pytorchs_layout():
    config = AutoConfig.from_pretrained(DEMO / "base-model", local_files_only=True)
    assert not config.tie_word_embeddings
    assert config.decoder_start_token_id == config.pad_token_id == 0
    with safe_open(DEMO / "base-model" / "model.safetensors", "np") as weights:
        assert weights.metadata() == {"format": "pt"}
        assert {"shared.weight", "lm_head.weight", "decoder.final_layer_norm.weight"} <= set(weights.keys())
        assert weights.get_tensor("lm_head.weight").shape == (config.vocab_size, config.d_model)


def test_the_tokenizer_is_t5s(tokenizer):
    assert isinstance(tokenizer, T5TokenizerFast)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer("hola")["input_ids"][-1] == tokenizer.eos_token_id
    assert len(tokenizer) == AutoConfig.from_pretrained(DEMO / "base-model", local_files_only=True).vocab_size


@pytest.mark.parametrize(
    "text",
    ["áéíóúüñ¿¡ÁÉÍÓÚÑ«»", "¿Qué ñandú, «pingüino», vio Íñigo?", "Vosotros tenéis zumo; ustedes, jugo: 7:05, 1,250 €."],
)
def test_the_tokenizer_keeps_spanish(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
