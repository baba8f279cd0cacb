"""Hugging Face transformers over our kernels: an attention implementation, and `accelerate` for the rest of a model.

import llmfast.integrations.transformers as fast          # registers attn_implementation="llmfast"
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="llmfast")
report = fast.accelerate(model)                            # norms, MLPs, loss and attention; print(report)
report.undo()
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import ops
from ..errors import InputError
from ..nn import functional
from . import modules

NAME = "llmfast"
WINDOW = "_llmfast_window"  # what masks know
# What our attention lacks: arguments of it, and the attributes of attention modules that hold them, None without one.
LACKS = {"softcap": "attn_logit_softcapping", "s_aux": "sinks"}


def mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """None where plain causal attention gives every token what it should have, else transformers' boolean mask.

    With gradients that is so of batches padded on the right as well: no token sees the padding behind it. What padding
    itself gets is then another value than with "sdpa", which no loss may use; without gradients `generate` does, which
    goes on from the last position whatever it holds. Values of masks are not looked at under a compiler.

    A mask that differs from plain causal attention by nothing but a sliding window knows that window, as an attribute:
    whatever else is made of the mask does not have it.
    """
    positions = options.get("cache_position")  # of the queries, in transformers 5.3; later their number and the first
    if positions is None:
        length, first = options["q_length"], options.get("q_offset", 0)
    else:
        length, first = positions.shape[0], positions[0]
    plain_causal = options.get("allow_is_causal_skip", True) and not torch.compiler.is_compiling()
    training = plain_causal and torch.is_grad_enabled()
    if training and attention_mask is not None and attention_mask.shape[-1] == length and first == 0:
        if not (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
            attention_mask = None
    made, window = sdpa_mask(attention_mask=attention_mask, **options), options.get("local_size")
    if made is not None and plain_causal and window is not None and _slides(options.get("config"), window):
        unbounded: dict[str, Any] = options | {"local_size": None}
        if sdpa_mask(attention_mask=attention_mask, **unbounded) is None:
            setattr(made, WINDOW, window)
    return made


def _slides(config: Any, size: int) -> bool:
    """Whether masks of this local size are those of a sliding window, not of chunks."""
    return getattr(config, "sliding_window", None) == size and getattr(config, "attention_chunk_size", None) is None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query: (B, H, Tq, D); key, value: (B, Hkv, Tk, D) -> (B, Tq, H, D).

    No mask means causal attention from the top left, or for a single query all of the keys, as `mask` and
    transformers' sdpa have it; one that knows its window means the same with that. Where there is another mask, or
    dropout, transformers' sdpa runs, which is said once, or is an error in strict mode and where a backend is asked for
    by name.
    """
    for name in LACKS:
        if options.get(name) is not None:
            raise InputError(f"attn_implementation='{NAME}' does not support {name}; use 'eager'")
    window = None if torch.compiler.is_compiling() else getattr(attention_mask, WINDOW, None)
    call = _why_not(attention_mask if window is None else None, dropout, options)
    if call is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = query.shape[2] > 1 and causal
        call = functional.plan(query, key, value, None, 0.0, causal, scaling, True, window)
    if isinstance(call, str):
        functional.fall_back(f"attn_implementation='{NAME}'", call, query.device.type)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    op, args = call
    return functional.run(op, None, args).contiguous(), None


def _why_not(attention_mask: Tensor | None, dropout: float, options: dict[str, Any]) -> str | None:
    if attention_mask is not None:
        return (
            "a mask is needed (padding on the left, or without gradients on the right, packed sequences, a static"
            " cache, several tokens after a cache, or under a compiler any attention_mask or a window)"
        )
    if dropout > 0.0:
        return "dropout is not 0"
    return "position_bias is given" if options.get("position_bias") is not None else None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss without the copy of the logits in float32. The mean over no label is 0, not NaN."""
    targets = _targets(labels, ignore_index, shift_labels).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    rows = logits.reshape(-1, vocab_size)
    return _per_item(
        ops.cross_entropy(rows, targets, ignore_index=ignore_index, reduction=reduction), num_items_in_batch
    )


def _targets(labels: Tensor | None, ignore_index: int, shift_labels: Tensor | None) -> Tensor:
    """(B * T,), what each position is to predict: the next label, and nothing at the end."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def _per_item(loss: Tensor, items: Tensor | int | None) -> Tensor:
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


# Models whose logits are lm_head(model(...)) and nothing more.
CAUSAL_LMS = frozenset(f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma"))


def without_logits(base: type[nn.Module]) -> modules.Forward:
    """A training step's loss by ops.linear_cross_entropy: no logits are held, and output.logits is None.

    Anything else (no labels, model.eval(), logits_to_keep, an lm_head that an adapter wraps or that has hooks, a tuple
    as the result) is the model's own forward.
    """

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **options: Any) -> Any:
        keep = options.get("logits_to_keep")
        plain = modules.is_plain(self.lm_head) and not isinstance(keep, Tensor) and not keep
        plain = plain and options.get("return_dict") is not False and len(args) <= 5  # the sixth would be labels
        if labels is None or not self.training or not plain:
            return base.forward(self, *args, labels=labels, **options)
        outputs = self.model(*args, **options)
        x, weight = functional.autocast(outputs.last_hidden_state.flatten(0, -2), self.lm_head.weight)
        items, ignored = options.get("num_items_in_batch"), options.get("ignore_index", -100)
        targets = _targets(labels, ignored, options.get("shift_labels")).to(x.device)
        reduction = "mean" if items is None else "sum"
        bias = self.lm_head.bias
        loss = ops.linear_cross_entropy(x, weight, targets, bias, ignore_index=ignored, reduction=reduction)
        # The cache, if any, under the name that it has: "cache" since transformers 5.24, "past_key_values" before.
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=_per_item(loss, items), **others)

    return forward


@dataclass
class Report:
    """What `accelerate` replaced in a model by what, and what it left and why; each by the module's name."""

    model: nn.Module = field(repr=False)
    replaced: dict[str, str]
    left: dict[str, str]
    _undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)
    _number: int = field(default_factory=itertools.count().__next__, repr=False)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {count} x {what}" for what, count in Counter(self.replaced.values()).items()]
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            lines.append(f"  left {len(names)} ({names[0] or 'the model'}{', ...' if names[1:] else ''}): {reason}")
        return "\n".join(lines)

    def undo(self) -> None:
        """Put back what this report replaced, also in copies that others have made of modules inside the model since.

        What another report of the same model replaced stays, in whatever order the two are undone.
        """
        for module in self.model.modules():
            modules.restore(module, self._number)
        while self._undo:
            self._undo.pop()()


def accelerate(model: nn.Module, *, attention: bool = True, skip_logits: bool = False) -> Report:
    """Run our kernels in a model of transformers, or one that PEFT wraps: norms, MLPs, loss and attention.

    Only classes in the tables are touched; `print` the report for what was. Parameters stay where they are, under
    their names. With `skip_logits` a training step never holds the logits, and its output has none. A deep copy of
    the model is accelerated, too. A pickle, such as torch.save's of a whole model, has transformers' own modules beside
    our loss and attention: accelerate what is loaded from it.
    """
    report = Report(model, {}, {})
    within: list[str] = []  # gated MLPs, whose activations are part of what was replaced
    for name, module in model.named_modules():
        twin = modules.twin_of(module)
        if twin is None or any(name.startswith(prefix) for prefix in within):
            continue
        if isinstance(twin, str):
            report.left[name] = twin
        else:
            report.replaced[name] = f"{type(module).__name__} by {twin[0]}"
            modules.replace(module, twin, report._number)
        if modules.is_ours(module) and hasattr(module, "act_fn"):
            within.append(f"{name}.")
    for name in [n for n in report.left if any(other.startswith(f"{n}.") for other in report.replaced)]:
        del report.left[name]  # a part of it was replaced: GPT-2's MLP is its activation to us
    top = next(((n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
    if top is not None:
        _replace_loss(*top, skip_logits, report)
        if attention:
            _replace_attention(*top, report)
    return report


def _replace_loss(name: str, model: Any, skip_logits: bool, report: Report) -> None:
    label, loss = f"{name}.loss_function".lstrip("."), model.loss_function
    if loss is ForCausalLMLoss:
        undo = functools.partial(delattr, model, "_loss_function")
        if "_loss_function" in vars(model):
            undo = functools.partial(setattr, model, "_loss_function", loss)
        model.loss_function = causal_lm_loss
        report._undo.append(undo)
        report.replaced[label] = "ForCausalLMLoss by ops.cross_entropy"
    elif loss is causal_lm_loss:
        report.left[label] = modules.ALREADY
    else:
        report.left[label] = f"{getattr(loss, '__name__', loss)} is not ForCausalLMLoss"
        return
    if not skip_logits or modules.is_ours(model):
        return
    kind = type(model).__name__
    if kind in CAUSAL_LMS and type(model).__module__.startswith("transformers."):
        modules.replace(model, ("ops.linear_cross_entropy", without_logits), report._number)
        report.replaced[name] = f"{kind}'s loss by ops.linear_cross_entropy"
    else:
        report.left[name] = f"{kind} is not known to compute its logits by lm_head alone"


def _replace_attention(name: str, model: PreTrainedModel, report: Report) -> None:
    before, label = str(model.config._attn_implementation), f"{name}.attn_implementation".lstrip(".")
    lacking = [what for what, held in LACKS.items() if any(getattr(m, held, None) is not None for m in model.modules())]
    if lacking:
        report.left[label] = f"{NAME} attention does not support {' and '.join(lacking)}; {before} stays"
        return
    if before == NAME:
        report.left[label] = modules.ALREADY
        return
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME:
        report._undo.append(functools.partial(model.set_attn_implementation, before))
        report.replaced[label] = f"{before} attention by {NAME}"
    else:
        report.left[label] = "the model has attention of its own"
