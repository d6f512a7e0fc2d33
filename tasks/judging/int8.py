"""A candidate in int8, for services on CPUs: made, and judged on the sentences by which the candidate was judged."""

from __future__ import annotations

from pathlib import Path

import ctranslate2

from tasks.data.tokenizer import load_tokenizer
from tasks.evaluate import read_tables
from tasks.judging import ctranslate
from tasks.judging.metrics import TEST
from tasks.judging.scoring import corpus_scores
from tasks.judging.translation import decode, encode
from tasks.run import Run


def make(run: Run, candidate: Path, converted: Path) -> float:
    """Write the model of a directory as a CTranslate2 model in int8, and return its BLEU on the test split.

    It translates on the CPU, as a service would. Raises `DataError` for a model that CTranslate2 does not know.
    """
    tokenizer = load_tokenizer(candidate)
    ctranslate.convert(candidate, tokenizer, converted, quantization="int8")
    translator = ctranslate2.Translator(str(converted), device="cpu", compute_type="int8")
    translations, _ = read_tables(run)
    test = translations[translations["set"] == TEST]
    preprocessing = run.settings.preprocessing
    sources = encode(tokenizer, test["source"].tolist(), preprocessing.prompt, preprocessing.max_tokens)
    search = run.settings.evaluation.model_dump(include={"max_new_tokens", "batch_size", "beams"})
    outputs = ctranslate.generate(translator, tokenizer, sources, label="the int8 model translates", **search)
    return corpus_scores(decode(tokenizer, outputs), test["reference"].tolist())["bleu"]["score"]
