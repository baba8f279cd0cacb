"""Models of transformers compute, train and generate the same over our kernels, in float32 on the CPU."""

import copy
import inspect
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers  # noqa: E402

import llmfast.integrations.transformers as fast  # noqa: E402
from llmfast import ops  # noqa: E402
from llmfast.errors import BackendError, InputError  # noqa: E402
from llmfast.native import library  # noqa: E402
from llmfast.nn import functional  # noqa: E402

SIZE = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": None}
SIZE |= {"num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZE),
    "qwen2": lambda: transformers.Qwen2Config(**SIZE),
    "qwen3": lambda: transformers.Qwen3Config(**SIZE, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SIZE, sliding_window=5),
    "gemma": lambda: transformers.GemmaConfig(**SIZE, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(  # whose scale is not 1/sqrt(head_dim)
        **SIZE, head_dim=16, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    ),
}
LLAMA = "llama"
# Since transformers 5.24, and before.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
CHECKPOINTING = "activation" if hasattr(transformers.LlamaModel, "activation_checkpointing_enable") else "gradient"
each_model = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def warns_anew() -> None:
    functional._warn_once.cache_clear()
    try:
        library.load("cpu")  # all of it runs on the CPU
    except BackendError as error:
        pytest.skip(str(error))


def make(name: str, attention: str = "sdpa") -> Any:
    """The same random weights every time, norms' too."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    for n, p in model.named_parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1 and "gemma" not in name and "bias" not in n), 0.2)
    return model.train()


def make_ours(name: str, **options: Any) -> Any:
    model = make(name)
    fast.accelerate(model, **options)
    return model


def tokens(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(5))


def padding(side: str) -> Tensor:
    """(3, 12) of which rows have 12, 9 and 4 tokens."""
    mask = torch.arange(12) < torch.tensor([[12], [9], [4]])
    return (mask if side == "right" else mask.flip(1)).long()


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def step(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training step and all gradients."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: Any, theirs: Any, **inputs: Any) -> None:
    (our_loss, our_grads), (loss, grads) = step(ours, **inputs), step(theirs, **inputs)
    assert_equal(our_loss, loss)
    assert our_grads.keys() == grads.keys() and grads
    for name, grad in grads.items():
        assert_equal(our_grads[name], grad)


class Calls:
    """Counts runs of ops, to tell what ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        run = ops.functional.run

        def counted(op: str, *rest: Any) -> Any:
            self.counts[op] += 1
            return run(op, *rest)

        for module in (ops.functional, functional):
            monkeypatch.setattr(module, "run", counted)


@each_model
def test_training_step_is_the_same(name: str) -> None:
    x = tokens()
    theirs = make(name)
    ours = make_ours(name)
    assert_equal(ours(input_ids=x).logits, theirs(input_ids=x).logits)
    assert_same_step(ours, theirs, input_ids=x, labels=x)


def test_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many calls of each op as a Llama of two layers has; a fallback would make the tests above pass, too."""
    calls, x, model = Calls(monkeypatch), tokens(), make_ours(LLAMA)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ops.BackendFallbackWarning)
        model(input_ids=x)
    assert calls.counts == {"attention": 2, "rms_norm": 5, "rope": 4, "activation_linear": 2}
    model(input_ids=x, labels=x)
    assert calls.counts["cross_entropy"] == 1 and calls.counts["attention"] == 4
    model.eval().generate(x, max_new_tokens=4, do_sample=False)
    assert calls.counts["attention"] == 6 and calls.counts["decode_attention"] == 6
    assert calls.counts["activation_linear"] == 4 and calls.counts["swiglu"] == 8
    assert calls.counts["rope"] == 24  # also where generation gives every row positions of its own


@each_model
def test_nothing_of_these_is_left(name: str) -> None:
    """The tables are by names in transformers, which may change them."""
    assert fast.accelerate(make(name)).left == {}


@pytest.mark.parametrize("why", ["frozen", "hook", "subclass"])
def test_a_layer_that_is_not_plain_is_called(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And trains the same; whatever else it does is not skipped."""

    class Scaled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    calls, ours, theirs = Calls(monkeypatch), make_ours(LLAMA), make(LLAMA)
    for model in (ours, theirs):
        for layer in model.model.layers:
            down = layer.mlp.down_proj
            if why == "frozen":
                down.requires_grad_(False)
            elif why == "hook":
                down.register_forward_hook(lambda module, args, out: 3 * out)
            else:
                down.__class__ = Scaled
    assert_same_step(ours, theirs, input_ids=tokens(), labels=tokens())
    assert calls.counts["activation_linear"] == 0


def test_rows_with_positions_of_their_own_rotate_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, x = Calls(monkeypatch), tokens()
    positions = torch.arange(12) + torch.tensor([[0], [3], [7]])
    assert_same_step(make_ours(LLAMA), make(LLAMA), input_ids=x, position_ids=positions, labels=x)
    assert calls.counts["rope"] == 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_padded_batches_are_the_same_where_tokens_are(name: str, side: str) -> None:
    x, mask = tokens(), padding(side)
    theirs, ours = make(name), make_ours(name)
    valid = mask.bool()
    results = [m(input_ids=x, attention_mask=mask).logits[valid] for m in (ours, theirs)]
    assert_equal(*results)
    with torch.no_grad():  # then padding is the same, too
        assert_equal(*(m(input_ids=x, attention_mask=mask).logits for m in (ours, theirs)))
    labels = x.masked_fill(~valid, -100)
    if side == "left":
        labels[:, :-1][~valid[:, :-1]] = -100
    assert_same_step(ours, theirs, input_ids=x, attention_mask=mask, labels=labels)


def test_padding_on_the_right_runs_ours_and_on_the_left_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = Calls(monkeypatch), make_ours(LLAMA)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ops.BackendFallbackWarning)
        model(input_ids=tokens(), attention_mask=padding("right"))
    assert calls.counts["attention"] == 2
    with pytest.warns(ops.BackendFallbackWarning, match="padding on the left"):
        model(input_ids=tokens(), attention_mask=padding("left"))


@pytest.mark.parametrize(("backend", "strict"), [("auto", True), ("cpp", False)])
def test_transformers_attention_is_an_error_in_strict_mode_and_of_a_named_backend(backend: str, strict: bool) -> None:
    model = make(LLAMA, fast.NAME)
    with ops.use_backend(backend, strict=strict):
        model(input_ids=tokens(), attention_mask=padding("right"))
        with pytest.raises(BackendError, match="padding on the left"):
            model(input_ids=tokens(), attention_mask=padding("left"))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
def test_greedy_generation_is_the_same(name: str, cache: str, side: str | None) -> None:
    """Also where a row ends in padding: it goes on from there. A window that holds only padding is eager's own case."""
    x = tokens()
    mask = torch.ones_like(x) if side is None else padding(side)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    theirs = make(name, "sdpa" if side == "right" else "eager")
    ours, theirs = (m.eval().generate(x, attention_mask=mask, **options) for m in (make_ours(name), theirs))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_equal(torch.stack(ours.logits), torch.stack(theirs.logits))


def test_several_tokens_after_a_cache_see_it() -> None:
    x = tokens()
    results = []
    for model in (make_ours(LLAMA), make(LLAMA)):
        first = model(input_ids=x[:, :7], use_cache=True)
        results.append(model(input_ids=x[:, 7:], **{CACHE: first[CACHE]}).logits)
    assert_equal(*results)


def test_packed_sequences_do_not_see_each_other() -> None:
    x = tokens()
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    results = [m(input_ids=x, position_ids=positions, use_cache=False).logits for m in (make_ours(LLAMA), make(LLAMA))]
    assert_equal(*results)
    assert_equal(results[0][:, 5:], make(LLAMA)(input_ids=x[:, 5:]).logits)


def test_attention_both_ways_does_not_see_padding() -> None:
    """A mask that is more than causal needs the padding on the right in it."""
    mask, results = padding("right"), []
    for model in (make_ours(LLAMA), make(LLAMA)):
        model.config.is_causal = False
        results.append(model(input_ids=tokens(), attention_mask=mask).logits[mask.bool()])
    assert_equal(*results)


def test_dropout_trains_by_transformers_attention() -> None:
    config = CONFIGS["gpt2"]()
    config.attn_pdrop = 0.3
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=fast.NAME).train()
    with pytest.warns(ops.BackendFallbackWarning, match="dropout"):
        model(input_ids=tokens())


def test_softcap_is_refused() -> None:
    config = transformers.Gemma2Config(**SIZE, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=fast.NAME)
    with pytest.raises(InputError, match="softcap"):
        model(input_ids=tokens())


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_items_in_batch_scale_the_loss(name: str) -> None:
    x = tokens()
    for items in (7, torch.tensor(7)):
        assert_same_step(make_ours(name), make(name), input_ids=x, labels=x, num_items_in_batch=items)


@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_without_logits_is_the_same(items: int | None) -> None:
    x = tokens()
    ours = make_ours(LLAMA, skip_logits=True)
    labels = x.masked_fill(x % 3 == 0, -100)
    assert_same_step(ours, make(LLAMA), input_ids=x, labels=labels, num_items_in_batch=items)
    assert ours(input_ids=x, labels=x).logits is None
    assert ours(input_ids=x).logits is not None
    assert ours.eval()(input_ids=x, labels=x).logits is not None
    assert isinstance(ours.train()(input_ids=x, labels=x, return_dict=False), tuple)


@pytest.mark.parametrize("use_cache", [False, True])
def test_the_output_without_logits_has_the_rest(use_cache: bool) -> None:
    options = {"input_ids": tokens(), "labels": tokens(), "use_cache": use_cache, "output_hidden_states": True}
    ours, theirs = make_ours(LLAMA, skip_logits=True)(**options), make(LLAMA)(**options)
    assert [name for name in theirs if name != "logits"] == list(ours) and (CACHE in ours) is use_cache
    for our_states, states in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_equal(our_states, states)


def test_report_and_the_way_back() -> None:
    model = make(LLAMA)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    before = dict(vars(model))
    report = fast.accelerate(model, skip_logits=True)
    assert list(model.state_dict()) == keys and [p.data_ptr() for p in model.parameters()] == pointers
    # Norms, MLPs, rotations, the loss, the model's own forward, attention.
    assert len(report.replaced) == 5 + 2 + 2 + 1 + 1 + 1
    assert report.left == {}
    assert "5 x LlamaRMSNorm by ops.rms_norm" in str(report) and "2 x LlamaMLP by ops.activation_linear, silu" in str(
        report
    )
    assert "2 x LlamaAttention by ops.rope" in str(report)
    assert isinstance(model, transformers.LlamaForCausalLM)
    report.undo()
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert vars(model) == before and model.config._attn_implementation == "sdpa"


def test_what_is_not_known_is_listed_and_not_touched() -> None:
    class LlamaRMSNorm(torch.nn.Module):
        """Of the same name, but not transformers'."""

        def forward(self, x: Tensor) -> Tensor:
            return x

    config = CONFIGS[LLAMA]()
    config.hidden_act = "relu"
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.model.norm = LlamaRMSNorm()
    report = fast.accelerate(model)
    assert type(model.model.norm) is LlamaRMSNorm
    assert "not in the table" in report.left["model.norm"]
    assert "ReLU" in report.left["model.layers.0.mlp"]
    assert "left 2 (model.layers.0.mlp, ...): there is no gated product with ReLU" in str(report)
    assert "it is ours already" in str(fast.accelerate(model))


def test_a_copy_is_independent() -> None:
    model = make_ours(LLAMA)
    other = copy.deepcopy(model)
    assert_same_step(other, model, input_ids=tokens(), labels=tokens())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    x, ours = tokens(), make_ours(LLAMA)
    getattr(ours, f"{CHECKPOINTING}_checkpointing_enable")({"use_reentrant": reentrant})
    assert_same_step(ours, make(LLAMA), input_ids=x, labels=x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_compiles_in_one_graph(name: str, skip_logits: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(make_ours(name, skip_logits=skip_logits), fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": tokens(), "labels": tokens()}
    (our_loss, our_grads), (loss, grads) = step(compiled, **inputs), step(make(name), **inputs)
    assert_equal(our_loss, loss)
    for n, grad in grads.items():
        assert_equal(our_grads[f"_orig_mod.{n}"], grad)


def test_autocast_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embedding leaves queries in float32 beside bfloat16 values; the head's product is in bfloat16."""
    x, dtypes, op = tokens(), [], ops.linear_cross_entropy

    def linear_cross_entropy(*args: Any, **options: Any) -> Tensor:
        dtypes.extend(t.dtype for t in args[:2])
        return op(*args, **options)

    monkeypatch.setattr(ops, "linear_cross_entropy", linear_cross_entropy)
    for options in ({}, {"skip_logits": True}):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (step(m, input_ids=x, labels=x) for m in (make_ours(LLAMA, **options), make(LLAMA)))
        torch.testing.assert_close(ours[0], theirs[0].float(), rtol=2e-2, atol=0)
    assert dtypes == [torch.bfloat16] * 2


@pytest.mark.parametrize("first", ["peft", "accelerate"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_lora_trains_the_same_and_merges(first: str, skip_logits: bool) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], lora_dropout=0.0)
        torch.manual_seed(7)
        return peft.get_peft_model(model, peft.LoraConfig(**{**config.to_dict(), "init_lora_weights": False}))

    x, theirs, ours = tokens(), adapted(make(LLAMA)), make(LLAMA)
    if first == "peft":
        ours = adapted(ours)
        report = fast.accelerate(ours, skip_logits=skip_logits)
    else:
        report = fast.accelerate(ours, skip_logits=skip_logits)
        ours = adapted(ours)
    assert len(report.replaced) == 11 + skip_logits
    assert_same_step(ours, theirs, input_ids=x, labels=x)
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert_equal(ours(input_ids=x).logits, theirs(input_ids=x).logits)
