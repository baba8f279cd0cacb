"""The shape of a decoder and the table of presets: what they count, refuse and survive."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from llmfast.errors import InputError
from llmfast.models import GPT, PRESETS, Config, RopeScaling, preset

TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        # The figures of the released checkpoints (https://huggingface.co/openai-community/gpt2).
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_presets(name: str, n_params: int) -> None:
    """Built on the meta device, which has shapes and no memory."""
    config = preset(name)
    assert config.n_params == n_params
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == n_params
    assert (config.vocab_size, config.context_length, config.norm, config.mlp) == (
        50257,
        1024,
        "layer_norm",
        "gelu_tanh",
    )


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name: str) -> None:
    config = PRESETS[name]
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


WINDOWED = {"window": 4, "local_layers": (0,), "local_rope_theta": 1e4}


def test_what_json_changes_comes_back() -> None:
    """Tuples are lists there, and a RopeScaling an object."""
    config = preset("tiny", rope_scaling=RopeScaling("llama3", 8.0, original_context=32), **WINDOWED)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [config.is_local(i) for i in range(2)] == [True, False]
    assert [preset("tiny", window=4).is_local(i) for i in range(2)] == [True, True]
    with pytest.raises(InputError, match=r"local_layers is \(0, 2\); give different layers below 2"):
        preset("tiny", window=4, local_layers=(0, 2))
    with pytest.raises(InputError, match="need position 'rope'"):
        preset("tiny", position="learned", **WINDOWED)


def test_a_run_from_before_a_field_existed_still_loads() -> None:
    old = {name: value for name, value in TINY.to_dict().items() if list(TINY.to_dict()).index(name) < 16}
    assert list(old)[-1] == "dropout"
    assert Config.from_dict(old) == TINY


def test_flops_of_a_window() -> None:
    """By counting the keys that each token sees, half of its own."""
    full, windowed = preset("tiny"), preset("tiny", window=8, local_layers=(1,))
    context = 32
    seen = sum(min(i + 0.5, 8) for i in range(context)) / context
    difference = full.flops_per_token(context) - windowed.flops_per_token(context)
    assert difference == pytest.approx(12 * full.n_head * full.head_dim * (context / 2 - seen))
    assert preset("tiny", window=64).flops_per_token(context) == full.flops_per_token(context)


def test_preset_takes_changes_and_keeps_the_table() -> None:
    changed = preset("tiny", vocab_size=77, dropout=0.1)
    assert (changed.vocab_size, changed.dropout, changed.n_layer) == (77, 0.1, TINY.n_layer)
    assert PRESETS["tiny"].vocab_size != 77
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.vocab_size = 3  # type: ignore[misc]


def test_unknown_preset_names_the_choices() -> None:
    with pytest.raises(InputError, match="unknown preset 'gpt3'; choose one of: gpt2, gpt2-medium.*small"):
        preset("gpt3")


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(InputError, match="unknown Config fields: depth, width$"):
        Config.from_dict(TINY.to_dict() | {"width": 3, "depth": 2})
    values = TINY.to_dict()
    del values["d_mlp"]
    with pytest.raises(InputError, match="incomplete Config: .*'d_mlp'"):
        Config.from_dict(values)


SIZES = ("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_mlp")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[
            (size, value, f"Config.{size} is {value!r}; it must be a positive")
            for size in SIZES
            for value in (0, -1, 2.0)
        ],
        ("norm", "batch", "Config.norm is 'batch'; choose one of: layer_norm, rms_norm"),
        ("position", "alibi", "Config.position is 'alibi'; choose one of: learned, rope"),
        ("mlp", "relu", "Config.mlp is 'relu'; choose one of: gelu, gelu_tanh, swiglu"),
        ("n_kv_head", 3, "Config.n_head 2 is not a multiple of n_kv_head 3"),
        ("n_kv_head", 4, "Config.n_head 2 is not a multiple of n_kv_head 4"),
        ("head_dim", 7, "Config.head_dim is 7; rotary positions need an even one"),
        ("qkv_bias", 1, "Config.qkv_bias is 1; it must be True, False or None"),
        ("qk_norm", True, "Config.norm_offset and qk_norm need norm 'rms_norm'"),
        ("norm_offset", -1.0, "Config.norm_offset is -1.0"),
        ("window", 0, "Config.window is 0; it must be a positive integer"),
        ("local_layers", (0,), "Config.local_layers and local_rope_theta need a window"),
        ("local_rope_theta", 1e4, "Config.local_layers and local_rope_theta need a window"),
        ("attention_scale", 0.0, "Config.attention_scale is 0.0"),
        ("attention_softcap", float("inf"), "Config.attention_softcap is inf"),
        ("logit_softcap", "2", "Config.logit_softcap is '2'"),
        ("embedding_scale", float("nan"), "Config.embedding_scale is nan"),
        ("rope_scaling", 4.0, "Config.rope_scaling is 4.0; it must be a RopeScaling"),
        ("rope_scaling", {"kind": "ntk", "factor": 2.0}, "RopeScaling.kind is 'ntk'; choose one of: linear"),
        ("rope_scaling", {"kind": "yarn", "factor": 2.0}, "RopeScaling.original_context is None; yarn needs a length"),
        ("rope_scaling", {"kind": "linear"}, "incomplete Config: "),
        ("window", 10**400, "Config.window is 1000"),
        ("norm_eps", 10**400, "Config.norm_eps is 1000"),
        ("attention_scale", 10**400, "Config.attention_scale is 1000"),
        ("rope_theta", 1.0, "Config.rope_theta is 1.0; it must be at least 2"),
        ("head_dim", 2**24, "Config.n_head 2 times head_dim 16777216 is 33554432; it must be at most 16777216"),
        ("dropout", 1.0, "Config.dropout is 1.0"),
        ("dropout", -0.1, "Config.dropout is -0.1"),
        ("dropout", float("nan"), "Config.dropout is nan"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        preset("tiny", **{field: value})
    assert message in str(raised.value) and len(str(raised.value)) < 200


def test_tables_of_rotations_have_a_limit() -> None:
    """A million positions of 256 fit, no real model has more; without rotary positions there is no table."""
    assert preset("tiny", context_length=2**20, head_dim=256).context_length == 2**20
    with pytest.raises(InputError, match="context_length 1048577 times head_dim 256 is 268435712; it must be at most"):
        preset("tiny", context_length=2**20 + 1, head_dim=256)
    assert preset("tiny", context_length=2**20 + 1, head_dim=256, position="learned").head_dim == 256


def test_odd_head_dim_needs_no_rotation() -> None:
    assert preset("tiny", head_dim=7, position="learned").head_dim == 7
