"""A T5 in CTranslate2, which translates several times faster on a CPU than TensorFlow does.

CTranslate2's own converter reads a PyTorch model and so needs PyTorch. A T5 has few kinds of tensors, so they are put
in their places here, straight from safetensors, as `ctranslate2.converters.transformers.T5Loader` does.
Source: https://opennmt.net/CTranslate2
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.common_spec import Activation
from safetensors.numpy import load_file
from transformers import AutoConfig

from tasks.errors import DataError
from tasks.model import length_batches
from tasks.progress import Progress

ACTIVATIONS = {"gelu_new": Activation.GELUTanh, "gelu": Activation.GELU, "relu": Activation.RELU}

SPARE = "<spare>"  # begins the name of an embedding row that the tokenizer has no token for


def load(directory: Path, tokenizer: Any, compute_type: str = "float32") -> ctranslate2.Translator:
    """The T5 of a `from_pretrained` directory, on the GPU where there is one."""
    device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    with tempfile.TemporaryDirectory() as converted:
        convert(directory, tokenizer, Path(converted))
        return ctranslate2.Translator(converted, device=device, compute_type=compute_type)


def convert(directory: Path, tokenizer: Any, converted: Path, quantization: str | None = None) -> None:
    """Write the T5 of a `from_pretrained` directory as a CTranslate2 model, in float32 or as `quantization` says."""
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    weights = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    spec = specification(config, weights)
    names = token_names(tokenizer, config.vocab_size)
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.bos_token = spec.config.decoder_start_token = names[config.decoder_start_token_id]
    spec.config.eos_token, spec.config.unk_token = tokenizer.eos_token, tokenizer.unk_token
    spec.validate()
    spec.optimize(quantization)
    converted.mkdir(exist_ok=True)
    spec.save(str(converted))


def token_names(tokenizer: Any, rows: int) -> list[str]:
    """A name for each row of the embedding, spare ones too: CTranslate2 reads and writes tokens, not ids."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [*names, *(f"{SPARE}{row}" for row in range(len(names), rows))]


def row_of(token: str, tokenizer: Any) -> int:
    """The row of the embedding that a token names."""
    return int(token.removeprefix(SPARE)) if token.startswith(SPARE) else tokenizer.convert_tokens_to_ids(token)


def specification(config: Any, weights: dict[str, np.ndarray]) -> TransformerSpec:
    """A T5's tensors where CTranslate2 expects them. Raises `DataError` for a T5 of a kind that it does not know."""
    if config.dense_act_fn not in ACTIVATIONS:
        raise DataError(f"CTranslate2 has no activation {config.dense_act_fn!r}: set evaluation.engine to tensorflow")
    spec = TransformerSpec.from_config(
        (config.num_layers, config.num_decoder_layers),
        config.num_heads,
        activation=ACTIVATIONS[config.dense_act_fn],
        ffn_glu=config.is_gated_act,
        relative_attention_bias=True,
        rms_norm=True,
    )

    def attention(target: Any, prefix: str, norm: str, bias: str) -> None:
        query, key, value, output = (weights[f"{prefix}.{part}.weight"] for part in "qkvo")
        if len(target.linear) == 2:  # its own sentence: one product for query, key and value
            target.linear[0].weight = np.concatenate([query, key, value])
            target.relative_attention_bias = weights[bias]
            target.relative_attention_max_distance = np.int32(config.relative_attention_max_distance)
        else:
            target.linear[0].weight, target.linear[1].weight = query, np.concatenate([key, value])
        target.linear[-1].weight = output
        target.layer_norm.gamma = weights[norm]
        target.queries_scale = 1.0

    for name in ("encoder", "decoder"):
        stack = getattr(spec, name)
        embeddings = stack.embeddings[0] if name == "encoder" else stack.embeddings
        embeddings.weight = weights["shared.weight"]
        stack.scale_embeddings = False
        stack.layer_norm.gamma = weights[f"{name}.final_layer_norm.weight"]
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for number, layer in enumerate(stack.layer):
            block = f"{name}.block.{number}.layer"
            attention(layer.self_attention, f"{block}.0.SelfAttention", f"{block}.0.layer_norm.weight", bias)
            if name == "decoder":
                attention(layer.attention, f"{block}.1.EncDecAttention", f"{block}.1.layer_norm.weight", bias)
            dense = f"{block}.{1 if name == 'encoder' else 2}"
            layer.ffn.layer_norm.gamma = weights[f"{dense}.layer_norm.weight"]
            layer.ffn.linear_1.weight = weights[f"{dense}.DenseReluDense.wo.weight"]
            if config.is_gated_act:
                layer.ffn.linear_0.weight = weights[f"{dense}.DenseReluDense.wi_0.weight"]
                layer.ffn.linear_0_noact.weight = weights[f"{dense}.DenseReluDense.wi_1.weight"]
            else:
                layer.ffn.linear_0.weight = weights[f"{dense}.DenseReluDense.wi.weight"]
    if config.tie_word_embeddings:
        spec.decoder.projection.weight = weights["shared.weight"]
        spec.decoder.scale_outputs = np.float32(config.d_model**-0.5)
    else:
        spec.decoder.projection.weight = weights["lm_head.weight"]
    return spec


def generate(
    translator: ctranslate2.Translator,
    tokenizer: Any,
    sources: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    beams: int,
    label: str = "translate",
) -> list[list[int]]:
    """Token ids of the translations, in the order of the sources, which are token ids, too."""
    outputs: list[list[int]] = [[]] * len(sources)
    with Progress(label, total=len(sources), unit="sentences") as progress:
        for rows in length_batches([len(source) for source in sources], batch_size):
            answers = translator.translate_batch(
                [tokenizer.convert_ids_to_tokens(sources[row]) for row in rows],
                beam_size=beams,
                max_decoding_length=max_new_tokens,
                max_input_length=0,
            )
            for row, answer in zip(rows, answers, strict=True):
                outputs[row] = [row_of(token, tokenizer) for token in answer.hypotheses[0]]
            progress.advance(len(rows))
    return outputs
