"""config.json as published on the hub (July 2025): what is read, that nothing is refused, and what is written back."""

from dataclasses import replace
from typing import Any

import pytest

from llmfast.models import PRESETS, Config
from llmfast.weights.families import read_config, write_config

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}


def sizes(vocab: int, context: int, layers: int, heads: int, kv_heads: int, d_model: int, d_mlp: int) -> dict[str, Any]:
    return COMMON | {
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
    }


LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
# Name -> (the file, its number of parameters).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "openai-community/gpt2": (
        {"model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": 50257, "n_ctx": 1024}
        | {"n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "layer_norm_epsilon": 1e-5}
        | {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02}
        | {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True}
        | {"summary_type": "cls_index", "summary_use_proj": True, "bos_token_id": 50256, "eos_token_id": 50256}
        | {"task_specific_params": {"text-generation": {"do_sample": True}}, "architectures": ["GPT2LMHeadModel"]},
        124_439_808,
    ),
    "meta-llama/Llama-3.2-1B": (
        sizes(128256, 131072, 16, 32, 8, 2048, 8192)
        | {"model_type": "llama", "rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 500000.0}
        | {"head_dim": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pretraining_tp": 1}
        | {"attention_bias": False, "mlp_bias": False},
        1_235_814_400,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        sizes(49152, 8192, 30, 9, 3, 576, 1536)
        | {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None}
        | {"rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pretraining_tp": 1},
        134_515_008,
    ),
    "mistralai/Mistral-7B-v0.1": (
        sizes(32000, 32768, 32, 32, 8, 4096, 14336)
        | {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096, "rms_norm_eps": 1e-5}
        | {"tie_word_embeddings": False},
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-0.5B": (
        sizes(151936, 32768, 24, 14, 2, 896, 4864)
        | {"model_type": "qwen2", "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False}
        | {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "use_mrope": False},
        494_032_768,
    ),
    "Qwen/Qwen3-0.6B": (
        sizes(151936, 40960, 28, 16, 8, 1024, 3072)
        | {"model_type": "qwen3", "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
        | {"head_dim": 128, "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False}
        | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        596_049_920,
    ),
    "google/gemma-2-2b": (
        sizes(256000, 8192, 26, 8, 4, 2304, 9216)
        | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_bias": False}
        | {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "cache_implementation": "hybrid"}
        | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        2_614_341_888,
    ),
    "google/gemma-3-1b-pt": (
        {k: v for k, v in sizes(262144, 32768, 26, 4, 1, 1152, 6912).items() if k != "hidden_act"}
        | {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}
        | {"attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"cache_implementation": "hybrid", "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6}
        | {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
        | {"sliding_window": 512, "sliding_window_pattern": 6},
        999_885_952,
    ),
}


def published(name: str) -> Config:
    return read_config(PUBLISHED[name][0], name)[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    """All of the file is understood, the number of parameters is the published one, and nothing is lost in writing."""
    values, n_params = PUBLISHED[name]
    family, config = read_config(values, name)
    assert config.n_params == n_params
    assert write_config(config, family)[0] == values["model_type"] == family
    back = write_config(config, family)[1]
    assert {k: v for k, v in values.items() if k in back and v is not None and v != back[k]} in (
        {},
        {"sliding_window": 32768},  # Qwen2.5's, which is switched off
    )


def test_what_the_files_say() -> None:
    assert published("openai-community/gpt2") == PRESETS["gpt2"]
    llama, mistral = published("meta-llama/Llama-3.2-1B"), published("mistralai/Mistral-7B-v0.1")
    assert llama.rope_scaling is not None and llama.rope_scaling.factor == 32.0 and llama.rope_theta == 5e5
    assert mistral.window == 4096 and mistral.is_local(0) and mistral.is_local(31)
    qwen2, qwen3 = published("Qwen/Qwen2.5-0.5B"), published("Qwen/Qwen3-0.6B")
    assert qwen2.has_bias("qkv") and not qwen2.bias and not qwen2.has_bias("mlp") and qwen2.window is None
    assert qwen3.qk_norm and not qwen3.has_bias("qkv") and qwen3.head_dim * qwen3.n_head != qwen3.d_model
    gemma2, gemma = published("google/gemma-2-2b"), published("google/gemma-3-1b-pt")
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert [gemma2.is_local(i) for i in range(3)] == [True, False, True]
    assert [i for i in range(26) if not gemma.is_local(i)] == [5, 11, 17, 23]
    assert (gemma.window, gemma.rope_theta, gemma.local_rope_theta) == (512, 1e6, 1e4)
    assert gemma.tie_embeddings and gemma.norm_offset == 1.0 and gemma.embedding_scale == 1152**0.5


def test_the_first_family_that_can_express_a_model() -> None:
    llama = published("HuggingFaceTB/SmolLM2-135M")
    for config, family in (
        (PRESETS["gpt2"], "gpt2"),
        (replace(PRESETS["gpt2"], dropout=0.1), "gpt2"),
        (llama, "llama"),
        (replace(llama, window=9), "mistral"),
        (replace(llama, qkv_bias=True), "qwen2"),
        (replace(llama, qk_norm=True), "qwen3"),
        (replace(llama, qk_norm=True, window=9, local_layers=(3, 7)), "qwen3"),
        (published("google/gemma-3-1b-pt"), "gemma3_text"),
    ):
        assert write_config(config)[0] == family
