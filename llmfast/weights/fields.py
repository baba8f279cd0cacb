"""A foreign `config.json`, read field by field: each is understood, known to be harmless, or refused by name."""

import sys
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short  # a value may be as long as its file
from typing import Any, TypeVar

from .. import files
from ..errors import InputError
from ..models import RopeScaling

MAX_SIZE = 2**24  # of any one dimension: vocabularies are below 2^19, layers below 2^17 wide
MAX_CONTEXT = 2**21  # positions: tables of rotations are made for all of them
MAX_LAYERS = 1024

# Nothing here changes what a forward pass computes: names, versions, token ids, and settings of training or of other
# heads than the language model's. `settings` hands them back to an exported file.
HARMLESS = frozenset(
    "_attn_implementation_autoset _from_model_config _name_or_path _num_labels _sliding_window_pattern architectures"
    " attention_dropout attn_pdrop bos_token_id cache_implementation dtype embd_pdrop eos_token_id id2label"
    " initializer_range is_llama_config label2id model_type n_ctx pad_token_id predict_special_tokens pretraining_tp"
    " reorder_and_upcast_attn resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type"
    " summary_use_proj task_specific_params torch_dtype transformers.js_config transformers_version use_cache".split()
)
# What does nothing as long as it is false or null: other outputs and uses of a model, and what other families have. Not
# `is_causal`, which is on where a file lacks it.
SWITCHED_OFF = frozenset(
    "_flash_attn_2_enabled add_cross_attention attention_bias attn_logit_softcapping auto_map begin_suppress_tokens"
    " cross_attention_hidden_size decoder_start_token_id do_sample early_stopping exponential_decay_length_penalty"
    " final_logit_softcapping finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing"
    " is_decoder is_encoder_decoder layer_types max_window_layers mlp_bias output_attentions output_hidden_states"
    " output_scores partial_rotary_factor prefix problem_type quantization_config remove_invalid_values"
    " return_dict_in_generate rope_interleaved rope_local_base_freq scale_attn_by_inverse_layer_idx sep_token_id"
    " sliding_window sliding_window_pattern suppress_tokens tf_legacy_loss tie_encoder_decoder tokenizer_class"
    " torchscript use_bfloat16 use_bidirectional_attention use_mrope use_sliding_window".split()
)
# The same within rotary parameters.
_ROPE_SWITCHED_OFF = frozenset(
    "attention_factor beta_fast beta_slow factor finetuned high_freq_factor long_factor low_freq_factor mrope_section"
    " mscale mscale_all_dim original_max_position_embeddings short_factor truncate".split()
)
# Of those that are harmless, what belongs to one file or one library version.
_OF_THE_FILE = frozenset(
    ("_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version")
)

V = TypeVar("V")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that must be there."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; give a folder with config.json and *.safetensors") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


class Fields:
    """The values of a foreign configuration that nobody has taken yet. `where` names it in errors."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = dict(values), where

    def __contains__(self, name: str) -> bool:
        """Whether the file names it, be it as null."""
        return name in self._values

    def take(self, name: str, default: Any = None) -> Any:
        """The value, which counts as understood from now on; `default` where it is absent or null."""
        value = self._values.pop(name, None)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        value = self.take(name, default)
        if value is None:
            raise InputError(f"{self.where}: {name} is missing")
        if type(value) is not int or not 1 <= value <= limit:
            raise InputError(f"{self.where}: {name} is {short(value)}; it must be 1 to {limit}")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive one."""
        value = self.take(name, default)
        if type(value) not in (int, float) or not 0.0 < value <= sys.float_info.max:
            raise InputError(f"{self.where}: {name} is {short(value)}; it must be positive and finite")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if type(value) is not bool:
            raise InputError(f"{self.where}: {name} is {short(value)}; it must be true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, V], default: str) -> V:
        value = self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"{self.where}: {name} {short(value)} is not supported; known: {', '.join(choices)}")
        return choices[value]

    def table(self, name: str) -> "Fields | None":
        """A nested object."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{self.where}: {name} is {short(value)}; it must be an object")
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def finish(self, harmless: frozenset[str], switched_off: frozenset[str]) -> None:
        """Refuse what nobody took, unless it is `harmless`, or one of `switched_off` and false or null."""
        if self._values.get("quantization_config"):
            raise InputError(f"{self.where}: the weights are quantised; give a checkpoint in bfloat16 or float32")
        for name, value in self._values.items():
            if name not in harmless and not (name in switched_off and (value is None or value is False)):
                text = f"{name} = {short(value)}"
                raise InputError(f"{self.where}: {text} is not supported, and ignoring it could be wrong")


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported file should keep of a foreign configuration: token ids and the like."""
    return {name: value for name, value in values.items() if name in HARMLESS - _OF_THE_FILE}


# A foreign rope type: its name in RopeScaling is the same, and so are its fields but for one.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
_ORIGINAL_CONTEXT = "original_max_position_embeddings"


def read_rope(
    fields: Fields, parameters: Fields | None, theta: float, context: int
) -> tuple[float, RopeScaling | None]:
    """Base and scaling, of `parameters` or of `rope_theta` and `rope_scaling`, where they stood before transformers 5.

    Where a file has both, they must agree. `theta` is the base where it names none.
    """
    named, scaling = "rope_theta" in fields, fields.table("rope_scaling")
    old = read_rope_table(scaling, fields.number("rope_theta", theta), context)
    if parameters is None:
        return old
    new = read_rope_table(parameters, old[0], context)
    if (scaling is not None and new != old) or (named and new[0] != old[0]):
        raise InputError(f"{fields.where}: rope_parameters contradicts rope_theta or rope_scaling; keep one of them")
    return new


def read_rope_table(table: Fields | None, theta: float, context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of one object of rotary parameters; `theta` and `context` where it leaves them out."""
    if table is None:
        return theta, None
    kind, older = table.take("rope_type"), table.take("type")
    if kind is not None and older is not None and kind != older:
        raise InputError(f"{table.where}: rope_type {short(kind)} and type {short(older)} differ; keep one of them")
    kind = kind or older or "default"
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise InputError(f"{table.where}: rope_type {short(kind)} is not supported; known: {', '.join(_ROPE_FIELDS)}")
    theta = table.number("rope_theta", theta)
    if table.number("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{table.where}: partial_rotary_factor other than 1 is not supported")
    values = {}
    for name in _ROPE_FIELDS[kind]:
        value = table.take(_ORIGINAL_CONTEXT if name == "original_context" else name)
        if value is not None:
            values[name] = value
    table.finish(frozenset(), _ROPE_SWITCHED_OFF)
    if kind == "default":
        return theta, None
    if "original_context" in _ROPE_FIELDS[kind]:
        values.setdefault("original_context", context)
    try:
        return theta, RopeScaling(kind, **values)  # pyright: ignore[reportArgumentType]
    except (InputError, TypeError) as error:
        raise InputError(f"{table.where}: {error}") from None


def rope_table(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """One object of rotary parameters, the inverse of `read_rope_table`."""
    table: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind, "rope_theta": float(theta)}
    for name in _ROPE_FIELDS[table["rope_type"]]:
        value = getattr(scaling, name)
        if value is not None:
            table[_ORIGINAL_CONTEXT if name == "original_context" else name] = value
    return table
