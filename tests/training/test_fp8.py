"""Training by products of 8-bit floats: in the blocks, while gradients are asked for, and near what 16 bits learn."""

from pathlib import Path

import pytest
import torch

from llmfast.errors import InputError
from llmfast.models import GPT, preset

from .test_loop import losses, make_model, run, weights


@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"])
def test_reaches_every_matrix_while_training_alone(mlp: str) -> None:
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=32, context_length=16, mlp=mlp, tie_embeddings=False))
    ids = torch.randint(0, 32, (2, 16))

    def outcome() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model.loss(ids, ids)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad():
        logits = model(ids)
    loss, gradients = outcome()
    model.set_fp8(True)
    with torch.no_grad():
        assert torch.equal(model(ids), logits)
    loss8, gradients8 = outcome()
    assert 0 < (loss8 - loss).abs() < 0.02 * loss
    for name, gradient in gradients.items():
        error = (gradients8[name] - gradient).norm() / gradient.norm()
        is_product = gradient.dim() == 2 and "embedding" not in name
        assert (0.02 if is_product else 0.0) < error < 0.2, name
    model.blocks.apply(lambda layer: setattr(layer, "fp8", False))
    assert 0 < (outcome()[0] - loss).abs() < (loss8 - loss).abs() + 0.01 * loss  # the head's alone
    model.set_fp8(False)
    assert torch.equal(outcome()[0], loss)


def test_learns_as_16_bits_do_and_is_put_back(tmp_path: Path) -> None:
    options = {"max_steps": 60, "learning_rate": 1e-2}
    run(tmp_path / "plain", **options)
    models = {again: make_model() for again in (False, True)}
    for again, model in models.items():
        run(tmp_path / str(again), model, fp8=True, activation_checkpointing=again, **options)
        assert not model.fp8
    plain, fp8, checkpointed = (losses(tmp_path / name) for name in ("plain", "False", "True"))
    assert fp8 != plain and abs(fp8[-1] - plain[-1]) < 0.1 < plain[0] - plain[-1]
    assert checkpointed == fp8
    assert all(torch.equal(p, q) for p, q in zip(weights(models[True]), weights(models[False]), strict=True))


def test_widths_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model = GPT(preset("tiny", vocab_size=32, context_length=16, d_mlp=200))
    with pytest.raises(InputError, match=r"fp8 is True; it must be False .* multiples of 16: d_mlp is 200 wide"):
        run(tmp_path, model, fp8=True)
