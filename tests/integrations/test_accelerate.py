"""What `accelerate` leaves and why, how reports are undone, and what Trainer, pickles and copies make of the models."""

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers  # noqa: E402

import llmfast.integrations.transformers as fast  # noqa: E402
from llmfast.integrations import modules  # noqa: E402

from .test_transformers import LLAMA, SIZE, assert_equal, assert_same_step, make, make_ours, tokens  # noqa: E402


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def ours_in(model: nn.Module) -> int:
    return sum(modules.is_ours(module) for module in model.modules())


GPT_OSS = {**SIZE, "head_dim": 16, "num_local_experts": 4, "sliding_window": 5}


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        (transformers.Gemma2Config(**SIZE, head_dim=16), "softcap"),
        (transformers.Gemma2Config(**SIZE, head_dim=16, attn_logit_softcapping=None), None),
        (transformers.GptOssConfig(**GPT_OSS), "s_aux"),
    ],
    ids=["gemma2", "gemma2 without a cap", "gpt-oss"],
)
def test_attention_that_ours_cannot_be_is_left(config: Any, lacking: str | None) -> None:
    x, logits = tokens(), []
    for accelerated in (True, False):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        if accelerated:
            left = fast.accelerate(model).left.get("attn_implementation")
            assert left == (lacking and f"llmfast attention does not support {lacking}; eager stays")
        logits.append(model(input_ids=x).logits)
    assert_equal(*logits)


@pytest.mark.parametrize("why", ["hook", "forward"])
def test_without_logits_an_lm_head_that_is_not_plain_is_called(why: str) -> None:
    ours, theirs = make_ours(LLAMA, skip_logits=True), make(LLAMA)
    for model in (ours, theirs):
        head = model.lm_head
        if why == "hook":
            head.register_forward_hook(lambda module, args, out: 3 * out)
        else:
            head.forward = lambda x, own=head.forward: 3 * own(x)
    assert_same_step(ours, theirs, input_ids=tokens(), labels=tokens())


def test_without_logits_those_to_keep_may_be_listed() -> None:
    ours, kept = make_ours(LLAMA, skip_logits=True), torch.tensor([0, 3])
    out = ours(input_ids=tokens(), labels=tokens()[:, kept], logits_to_keep=kept)
    assert_equal(out.logits, make(LLAMA)(input_ids=tokens()).logits[:, kept])


def test_classes_keep_their_names(tmp_path: Path) -> None:
    model, names = make(LLAMA), [c.__qualname__ for c in classes(make(LLAMA))]
    fast.accelerate(model, skip_logits=True)
    assert [c.__qualname__ for c in classes(model)] == names
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("skip_logits", [False, True])
def test_trainer_smooths_labels_the_same(skip_logits: bool, tmp_path: Path) -> None:
    """It shifts the labels of models of classes whose names it knows."""
    pytest.importorskip("accelerate")
    options: dict[str, Any] = {"label_smoothing_factor": 0.1, "use_cpu": True, "report_to": []}
    losses = []
    for model in (make_ours(LLAMA, skip_logits=skip_logits), make(LLAMA)):
        trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), **options))
        losses.append(trainer.compute_loss(model, {"input_ids": tokens(), "labels": tokens()}))
    assert isinstance(losses[0], Tensor) and isinstance(losses[1], Tensor)
    assert_equal(losses[0], losses[1])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_reports_undo_what_they_replaced_in_any_order(order: tuple[int, int]) -> None:
    model = make(LLAMA)
    before, own = classes(model), dict(vars(model))
    reports = [fast.accelerate(model), fast.accelerate(model, skip_logits=True)]
    assert reports[1].replaced == {"": "LlamaForCausalLM's loss by ops.linear_cross_entropy"}
    assert set(reports[1].left.values()) == {modules.ALREADY}
    for left, i in zip((ours_in(model) - (9, 1)[order[0]], 0), order, strict=True):
        reports[i].undo()
        assert ours_in(model) == left
    assert classes(model) == before and vars(model) == own and model.config._attn_implementation == "sdpa"


def test_a_report_undone_undoes_no_later_one() -> None:
    model = make(LLAMA)
    first = fast.accelerate(model)
    first.undo()
    fast.accelerate(model)
    first.undo()
    assert ours_in(model) == 9 and model.config._attn_implementation == fast.NAME


def test_a_report_undoes_copies_inside_the_model() -> None:
    """PEFT's modules_to_save are such."""
    model = make(LLAMA)
    report = fast.accelerate(model)
    model.model.norm.copied = copy.deepcopy(model.model.norm)
    assert ours_in(model) == 10
    report.undo()
    assert ours_in(model) == 0


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_has_the_classes_of_before(how: str) -> None:
    model, stream = make_ours(LLAMA, skip_logits=True), io.BytesIO()
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
    assert classes(loaded) == classes(make(LLAMA))
    assert all("_llmfast_by" not in vars(module) for module in loaded.modules())
    assert_same_step(loaded, make(LLAMA), input_ids=tokens(), labels=tokens())
    assert fast.accelerate(loaded, skip_logits=True).left == {
        "loss_function": modules.ALREADY,
        "attn_implementation": modules.ALREADY,
    }
    assert_same_step(loaded, make(LLAMA), input_ids=tokens(), labels=tokens())


@pytest.mark.slow
def test_a_pickle_loads_where_nothing_is_imported(tmp_path: Path) -> None:
    """This model's loss is its own: only its modules are ours, and its attention, by name."""
    torch.manual_seed(3)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZE, num_labels=3)).eval()
    fast.accelerate(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save((tokens(), model(input_ids=tokens()).logits), tmp_path / "tensors.pt")
    code = "import sys, torch; model, (x, y) = (torch.load(path, weights_only=False) for path in sys.argv[1:]);"
    code += "torch.testing.assert_close(model(input_ids=x).logits, y, rtol=1e-4, atol=1e-5)"
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(tmp_path / "tensors.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_deep_copy_is_accelerated_and_apart() -> None:
    model = make_ours(LLAMA, skip_logits=True)
    model.compile(backend="eager")  # which a copy is not, as PyTorch has it
    other = copy.deepcopy(model)
    assert classes(other) == classes(model) and other._compiled_call_impl is None
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert other(input_ids=tokens(), labels=tokens()).logits is None
