"""The copy in int8: published when it translates nearly as well as the candidate, and otherwise not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import retrain_models
from tasks import artifacts, promote, registry
from tasks.judging import ctranslate
from tasks.judging.scoring import corpus_scores
from tasks.judging.translation import decode, encode
from tasks.run import Run
from tasks.settings import load
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
SEARCH = {"max_new_tokens": 48, "batch_size": 64, "beams": 1}
# The products that read what a layer norm has made; the keys and values of EncDecAttention read the encoder instead.
READERS = ("SelfAttention.q.", "SelfAttention.k.", "SelfAttention.v.", "EncDecAttention.q.", "DenseReluDense.wi")
Judged = Callable[[Path, float], Run]


@pytest.fixture
def judged(bucket: Store, tokenizer: Any, tmp_path: Path) -> Judged:
    """A run whose candidate is the model of a directory, with its true BLEU on a part of the demo's test split."""
    pairs = pd.read_parquet(ROOT / "examples/demo/corpus/en-es/test-00000-of-00001.parquet")["translation"][:100]
    test = pd.DataFrame({"set": "test", "source": [p["en"] for p in pairs], "reference": [p["es"] for p in pairs]})

    def make(candidate: Path, margin: float) -> Run:
        run = Run(bucket, f"runs/{candidate.name}-{margin:g}")
        settings = load(ROOT / "config" / "demo.yaml", {"promotion.int8_margin": margin})
        prompt, longest = settings.preprocessing.prompt, settings.preprocessing.max_tokens
        sources = encode(tokenizer, test["source"].tolist(), prompt, longest)
        outputs = ctranslate.generate(ctranslate.load(candidate, tokenizer), tokenizer, sources, **SEARCH)
        bleu = corpus_scores(decode(tokenizer, outputs), test["reference"].tolist())["bleu"]["score"]
        test.to_parquet(tmp_path / "translations.parquet")
        test.to_parquet(tmp_path / "losses.parquet")  # read with the other, and not used
        for name in ("translations", "losses"):
            bucket.upload(tmp_path / f"{name}.parquet", run.key("evaluation", f"{name}.parquet"))
        config = {"settings": settings.model_dump(), "created": "2026-11-24T00:00:00+00:00", "code_version": "c"}
        bucket.put_json(run.key("config.json"), config)
        champion = registry.champion_of(bucket, "demo", run.id)
        fingerprint = artifacts.publish(bucket, run.key("candidate"), candidate).fingerprint
        results: dict[str, dict[str, Any]] = {
            "pull": {"inputs": "i", "dataset": "d", "base_model": "b"},
            "train": {"candidate": run.key("candidate")},
            "evaluate": {"bleu": {"candidate": bleu, "champion": 1}, "validation_loss": {"candidate": 1}},
            "gate": {"decision": "promote", "champion_version": champion, "summary": "better", "checks": []},
        }
        results["evaluate"]["champion"] = champion
        results["gate"]["candidate_fingerprint"] = fingerprint
        for step, result in results.items():
            run.save_result(step, {**result, "seconds": 1.0})
        return run

    return make


def with_outliers(base: Path, directory: Path) -> Path:
    """The same function in full precision, but int8 cannot hold it: one input of each product is a thousand times
    smaller, and its weights as many times larger than all others."""
    directory.mkdir()
    for path in base.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    weights = {name: tensor.copy() for name, tensor in load_file(base / "model.safetensors").items()}
    for name, tensor in weights.items():
        layer, _, part = name.rpartition(".layer_norm.weight")
        if not layer or part:
            continue
        tensor[0] /= 1000
        for other, product in weights.items():
            if other.startswith(layer) and any(f".{reader}" in other for reader in READERS):
                product[:, 0] *= 1000
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_copy_that_is_nearly_as_good_is_part_of_the_version(base: Path, judged: Judged, tmp_path: Path) -> None:
    run = judged(base, 2)
    result = promote.run(run)
    version = result["version"]
    found = registry.manifest(run.store, "demo", version).metadata["int8"]
    full = run.result("evaluate")["bleu"]["candidate"]
    assert full > 20
    assert found["published"]
    assert abs(found["bleu"] - full) <= found["margin"] == 2
    assert result["summary"].endswith(f", with its int8 copy, of BLEU {found['bleu']:.2f}")
    pulled = retrain_models.pull("demo", "production", tmp_path / "model", int8=True).directory
    assert not list(pulled.glob("*.safetensors"))
    translator = ctranslate2.Translator(str(pulled / "ctranslate2"))
    assert "int8" in translator.compute_type
    tokenizer = Tokenizer.from_file(str(pulled / "tokenizer.json"))
    (answer,) = translator.translate_batch([tokenizer.encode("translate English to Spanish: Good morning.").tokens])
    assert tokenizer.decode([tokenizer.token_to_id(token) for token in answer.hypotheses[0]])
    manifest = registry.manifest(run.store, "demo", version)
    assert promote.run(run)["version"] == version  # as when a task is cleared
    assert registry.manifest(run.store, "demo", version) == manifest


def test_a_copy_that_loses_too_much_is_left_out(base: Path, judged: Judged, tmp_path: Path) -> None:
    run = judged(with_outliers(base, tmp_path / "outliers"), 2)
    result = promote.run(run)
    manifest = registry.manifest(run.store, "demo", result["version"])
    full, found = run.result("evaluate")["bleu"]["candidate"], manifest.metadata["int8"]
    assert full > 20  # the model itself is as good as before
    assert not found["published"]
    assert found["bleu"] < full - 2
    assert f", without its int8 copy, of BLEU {found['bleu']:.2f}" in result["summary"]
    assert not any(file.path.startswith("ctranslate2/") for file in manifest.files)
    pulled = retrain_models.pull("demo", "production", tmp_path / "model", int8=True)
    assert (pulled.version, (pulled.directory / "model.safetensors").exists()) == (result["version"], True)
