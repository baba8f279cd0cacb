"""The model families of Hugging Face: the only place that knows their names for fields and for tensors.

A family reads a foreign configuration into the fields of `Config` and writes it back, and names the foreign modules
that each of our modules is made of. Sources: https://github.com/huggingface/transformers/tree/main/src/transformers/models
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from reprlib import repr as short
from typing import Any

from ..errors import InputError
from ..models import Config
from .fields import HARMLESS, MAX_CONTEXT, MAX_LAYERS, SWITCHED_OFF, Fields, read_rope, read_rope_table, rope_table

Modules = dict[str, tuple[str, ...]]  # ours -> theirs, joined along the outputs; {} is the layer
FULL, SLIDING = "full_attention", "sliding_attention"


_GPT2_MODULES: Modules = {
    "token_embedding": ("transformer.wte",),
    "position_embedding": ("transformer.wpe",),
    "blocks.{}.attention_norm": ("transformer.h.{}.ln_1",),
    "blocks.{}.attention.qkv": ("transformer.h.{}.attn.c_attn",),
    "blocks.{}.attention.proj": ("transformer.h.{}.attn.c_proj",),
    "blocks.{}.mlp_norm": ("transformer.h.{}.ln_2",),
    "blocks.{}.mlp.up": ("transformer.h.{}.mlp.c_fc",),
    "blocks.{}.mlp.down": ("transformer.h.{}.mlp.c_proj",),
    "norm": ("transformer.ln_f",),
    "head": ("lm_head",),
}
_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_LLAMA_MODULES: Modules = {
    "token_embedding": ("model.embed_tokens",),
    "blocks.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "blocks.{}.attention.qkv": (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
    "blocks.{}.attention.q_norm": (_ATTENTION + "q_norm",),
    "blocks.{}.attention.k_norm": (_ATTENTION + "k_norm",),
    "blocks.{}.attention.proj": (_ATTENTION + "o_proj",),
    "blocks.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.mlp.up": (_MLP + "gate_proj", _MLP + "up_proj"),
    "blocks.{}.mlp.down": (_MLP + "down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
_GEMMA_MODULES: Modules = _LLAMA_MODULES | {
    "blocks.{}.attention_post_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.mlp_norm": ("model.layers.{}.pre_feedforward_layernorm",),
    "blocks.{}.mlp_post_norm": ("model.layers.{}.post_feedforward_layernorm",),
}


@dataclass(frozen=True)
class Family:
    """How one architecture is spelled outside."""

    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[Config], dict[str, Any]]
    modules: Modules = field(default_factory=lambda: _LLAMA_MODULES)
    prefix: str = "model."  # which files of the bare decoder leave out
    transposed: bool = False  # matrices of the blocks are stored (inputs, outputs)
    dropped: tuple[str, ...] = (".rotary_emb.inv_freq",)  # endings of tensors that are no weights


def read_config(values: dict[str, Any], where: str) -> tuple[str, Config]:
    """The family of a foreign configuration and its Config; whatever is not understood is refused by name."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{where}: model_type {short(name)} is not supported; known: {', '.join(FAMILIES)}")
    fields = Fields(values, where)
    try:
        config = Config(**FAMILIES[name].read(fields))
    except InputError as error:
        raise InputError(str(error) if where in str(error) else f"{where}: {error}") from None
    fields.finish(HARMLESS, SWITCHED_OFF)
    return name, config


def write_config(config: Config, family: str | None = None) -> tuple[str, dict[str, Any]]:
    """The family, the first that can express `config` unless it is given, and its configuration without settings.

    It is read back to see that nothing is lost; dropout is a choice of each training and not written.
    """
    if family is not None and family not in FAMILIES:
        raise InputError(f"family {family!r} is not known; choose one of: {', '.join(FAMILIES)}")
    wanted, reasons = replace(config, dropout=0.0), []
    for name in FAMILIES if family is None else (family,):
        values = {"model_type": name, "architectures": [FAMILIES[name].architecture], **FAMILIES[name].write(config)}
        try:
            _, back = read_config(values, name)
        except InputError as error:
            reasons.append(str(error))
            continue
        if back == wanted:
            return name, values
        mine, theirs = wanted.to_dict(), back.to_dict()
        different = [f"{field} {mine[field]!r}" for field in mine if mine[field] != theirs[field]]
        reasons.append(f"{name}: has no {', '.join(different)}")
    raise InputError(f"no family of Hugging Face's expresses this model ({'; '.join(reasons)})")


def _biases(qkv: bool, proj: bool, mlp: bool) -> dict[str, bool | None]:
    return {"bias": proj, "qkv_bias": None if qkv == proj else qkv, "mlp_bias": None if mlp == proj else mlp}


_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _read_gpt2(fields: Fields) -> dict[str, Any]:
    d_model, n_head = fields.size("n_embd"), fields.size("n_head")
    if d_model % n_head:
        raise InputError(f"{fields.where}: n_embd {d_model} is not a multiple of n_head {n_head}")
    return {
        "vocab_size": fields.size("vocab_size"),
        "context_length": fields.size("n_positions", limit=MAX_CONTEXT),
        "n_layer": fields.size("n_layer", limit=MAX_LAYERS),
        "n_head": n_head,
        "n_kv_head": n_head,
        "head_dim": d_model // n_head,
        "d_model": d_model,
        "d_mlp": fields.size("n_inner", 4 * d_model),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "mlp": fields.choice("activation_function", _GELUS, "gelu_new"),
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        "attention_scale": None if fields.flag("scale_attn_weights", True) else 1.0,
    }


def _write_gpt2(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
        "n_inner": config.d_mlp,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu": "gelu"}.get(config.mlp, "gelu_new"),
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.attention_scale is None,
    }


def _read_decoder(fields: Fields, head_dim: int | None = None, tied: bool = False) -> dict[str, Any]:
    """What Llama and its relatives have in common; `head_dim` and `tied` are the family's defaults."""
    d_model, n_head = fields.size("hidden_size"), fields.size("num_attention_heads")
    return {
        "vocab_size": fields.size("vocab_size"),
        "context_length": fields.size("max_position_embeddings", limit=MAX_CONTEXT),
        "n_layer": fields.size("num_hidden_layers", limit=MAX_LAYERS),
        "n_head": n_head,
        "n_kv_head": fields.size("num_key_value_heads", n_head),
        "head_dim": fields.size("head_dim", head_dim or max(1, d_model // n_head)),
        "d_model": d_model,
        "d_mlp": fields.size("intermediate_size"),
        "norm": "rms_norm",
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "position": "rope",
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
    }


def _write_decoder(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_llama(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """With SiLU and one rotary base."""
    common = _read_decoder(fields, **defaults)
    theta, scaling = read_rope(fields, fields.table("rope_parameters"), 10_000.0, common["context_length"])
    mlp = fields.choice("hidden_act", {"silu": "swiglu"}, "silu")
    return common | {"mlp": mlp, "rope_theta": theta, "rope_scaling": scaling}


def _write_llama(config: Config) -> dict[str, Any]:
    return _write_decoder(config) | _one_rope(config) | {"hidden_act": "silu"}


def _one_rope(config: Config) -> dict[str, Any]:
    """Rotary parameters in the new and in the old place."""
    rope = rope_table(config.rope_theta, config.rope_scaling)
    scaling = None if config.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"}
    return {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _read_llama_biases(fields: Fields) -> dict[str, Any]:
    attention, mlp = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
    return _read_llama(fields) | _biases(attention, attention, mlp)


def _write_llama_biases(config: Config) -> dict[str, Any]:
    return _write_llama(config) | {"attention_bias": config.bias, "mlp_bias": config.has_bias("mlp")}


def _read_mistral(fields: Fields) -> dict[str, Any]:
    window = fields.take("sliding_window", None if "sliding_window" in fields else 4096)
    return _read_llama(fields) | {"window": window} | _biases(False, False, False)


def _write_mistral(config: Config) -> dict[str, Any]:
    return _write_llama(config) | {"sliding_window": config.window}


def _read_qwen(fields: Fields, **defaults: Any) -> dict[str, Any]:
    common = _read_llama(fields, **defaults)
    on, window = fields.flag("use_sliding_window", False), fields.take("sliding_window", 4096)
    first = fields.take("max_window_layers", 28)
    if type(first) is not int:
        raise InputError(f"{fields.where}: max_window_layers is {short(first)}; it must be a whole number")
    types = _layer_types(fields, [SLIDING if on and i >= first else FULL for i in range(common["n_layer"])])
    if not on and SLIDING in types:
        raise InputError(f"{fields.where}: layer_types has {SLIDING!r} while use_sliding_window is off")
    return common | _windows(fields, types, window)


def _write_qwen(config: Config) -> dict[str, Any]:
    window = {"use_sliding_window": config.window is not None, "sliding_window": config.window}
    return _write_llama(config) | window | {"layer_types": _types_of(config)}


def _read_qwen2(fields: Fields) -> dict[str, Any]:
    return _read_qwen(fields) | _biases(True, False, False)


def _read_qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return _read_qwen(fields, head_dim=128) | {"qk_norm": True} | _biases(bias, bias, False)


def _write_qwen3(config: Config) -> dict[str, Any]:
    return _write_qwen(config) | {"attention_bias": config.bias}


def _layer_types(fields: Fields, default: list[str]) -> list[str]:
    """The kind of each layer; `default` is what the family's other fields say."""
    types = fields.take("layer_types", default)
    if not isinstance(types, list) or len(types) != len(default):
        raise InputError(f"{fields.where}: layer_types must name the kind of each of {len(default)} layers")
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise InputError(f"{fields.where}: layer_types has {short(kind)}; known: {FULL}, {SLIDING}")
    return types


def _windows(fields: Fields, types: list[str], window: Any) -> dict[str, Any]:
    local = tuple(i for i, kind in enumerate(types) if kind == SLIDING)
    if not local:
        return {}
    if type(window) is not int or window < 1:
        raise InputError(f"{fields.where}: sliding_window is {short(window)}; it must be a positive integer")
    return {"window": window, "local_layers": None if len(local) == len(types) else local}


def _types_of(config: Config) -> list[str]:
    return [SLIDING if config.is_local(i) else FULL for i in range(config.n_layer)]


_GEGLUS = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu"}


def _read_gemma(fields: Fields, period: int) -> dict[str, Any]:
    """What both have; every `period`th layer is global unless layer_types says otherwise."""
    common = _read_decoder(fields, head_dim=256, tied=True)
    types = _layer_types(fields, [SLIDING if (i + 1) % period else FULL for i in range(common["n_layer"])])
    scalar, bias = fields.number("query_pre_attn_scalar", 256), fields.flag("attention_bias", False)
    fields.take("hidden_act")  # which hidden_activation has replaced
    gemma = {
        "mlp": fields.choice("hidden_activation", _GEGLUS, "gelu_pytorch_tanh"),
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_scale": common["d_model"] ** 0.5,
        "attention_scale": None if scalar == common["head_dim"] else scalar**-0.5,
    }
    window = _windows(fields, types, fields.take("sliding_window", 4096))
    return common | gemma | window | _biases(bias, bias, False)


def _write_gemma(config: Config) -> dict[str, Any]:
    scalar = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
    return _write_decoder(config) | {
        "hidden_activation": {"geglu": "gelu"}.get(config.mlp, "gelu_pytorch_tanh"),
        "query_pre_attn_scalar": scalar,
        "attention_bias": config.bias,
        "final_logit_softcapping": config.logit_softcap or None,
        "sliding_window": config.window or 4096,
        "layer_types": _types_of(config),
    }


def _read_gemma2(fields: Fields) -> dict[str, Any]:
    """It caps attention's scores and the logits, unless a file says null."""
    attention, logits = (
        fields.take(name, 0.0 if name in fields else default)
        for name, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    )
    common = _read_gemma(fields, 2)
    theta, scaling = read_rope(fields, fields.table("rope_parameters"), 10_000.0, common["context_length"])
    caps = {"attention_softcap": attention, "logit_softcap": logits}
    return common | caps | {"rope_theta": theta, "rope_scaling": scaling}


def _write_gemma2(config: Config) -> dict[str, Any]:
    return _write_gemma(config) | _one_rope(config) | {"attn_logit_softcapping": config.attention_softcap or None}


def _read_gemma3(fields: Fields) -> dict[str, Any]:
    """Queries and keys are normalised, and the local layers have a rotary base of their own."""
    common = _read_gemma(fields, fields.size("sliding_window_pattern", fields.take("_sliding_window_pattern", 6)))
    ropes, context = fields.table("rope_parameters"), common["context_length"]
    theta, scaling = read_rope(fields, ropes and ropes.table(FULL), 1_000_000.0, context)
    local_theta = fields.number("rope_local_base_freq", 10_000.0)
    if ropes is not None:
        local_theta, local_scaling = read_rope_table(ropes.table(SLIDING), local_theta, context)
        if local_scaling is not None:
            raise InputError(f"{fields.where}: rope_parameters of {SLIDING} are scaled, which is not supported")
        ropes.finish(frozenset(), frozenset())
    return common | {
        "qk_norm": True,
        "logit_softcap": fields.take("final_logit_softcapping", 0.0),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local_theta if "window" in common else None,
    }


def _write_gemma3(config: Config) -> dict[str, Any]:
    rope, local = _one_rope(config), rope_table(config.local_rope_theta or 10_000.0, None)
    both = {"rope_parameters": {FULL: rope["rope_parameters"], SLIDING: local}}
    return _write_gemma(config) | rope | both | {"rope_local_base_freq": local["rope_theta"]}


# By model_type. A model of ours goes to the first that can express it.
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        _read_gpt2,
        _write_gpt2,
        modules=_GPT2_MODULES,
        prefix="transformer.",
        transposed=True,
        dropped=(".attn.bias", ".attn.masked_bias"),
    ),
    "llama": Family("LlamaForCausalLM", _read_llama_biases, _write_llama_biases),  # and SmolLM
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2, modules=_GEMMA_MODULES),
    "gemma3_text": Family("Gemma3ForCausalLM", _read_gemma3, _write_gemma3, modules=_GEMMA_MODULES),
}
