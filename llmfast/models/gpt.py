"""The decoder: token ids in, logits out."""

import contextvars
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import InputError
from .cache import KVCache
from .config import Config
from .layers import Block, Linear, Norm
from .rope import rope_table

# Logits of more bytes than this are not held all at once in training; chunks of fewer cost more time than they save.
MAX_LOGITS = 2**30


class GPT(nn.Module):
    """A decoder-only transformer built from `llmfast.ops`.

    Parameters are float32; activations are in `compute_dtype`, float32 by default. Matrices may be kept in
    `compute_dtype`, too: as each is rounded to it before use, no result depends on that.

    Where `activation_checkpointing` is set, only what goes into a block is kept for the backward pass, which runs the
    block once more, to the same bits. After `set_fp8`, the matrix products of training are of 8-bit floats
    (`ops.fp8_linear` and its like; the head's not if its logits are capped); without gradients, as for evaluation,
    nothing changes.
    """

    rotary: Tensor | None

    def __init__(self, config: Config, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.activation_checkpointing = self.fp8 = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.context_length, config.d_model) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("rotary", _rotary_tables(config), persistent=False)
        self.register_load_state_dict_post_hook(_refill_tables)
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=compute_dtype, device="cpu"))
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal(0, 0.02), biases 0, and projections into the residual stream scaled by 1/sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                into_residual = name.endswith(("attention.proj.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02)

    def set_fp8(self, on: bool) -> None:
        self.fp8 = on
        for layer in self.blocks.modules():
            if isinstance(layer, Linear):
                layer.fp8 = on

    def forward(self, ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """ids: (B, T) int64 -> logits (B, T, vocab_size), or (B, 1, vocab_size) of the last token with `last_only`.

        With a cache, ids continue the tokens it holds. Ids are not checked against the vocabulary here.
        """
        x = self._hidden(ids, cache, last_only)
        logits = ops.linear(x, self._head_weight(x))
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _hidden(self, ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """What the head takes: (B, T or 1, d_model)."""
        start, length = (cache.length if cache else 0), ids.shape[1]
        if start + length > self.config.context_length:
            raise InputError(
                f"{start + length} tokens do not fit the context of {self.config.context_length}; shorten the input"
            )
        positions = cache.positions(length) if cache else slice(length)
        x = ops.embedding(self.token_embedding.weight, ids).to(self.compute_dtype)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[positions].to(x.dtype)
        rotary = None
        if self.rotary is not None:
            rotary = [(cos, sin) for cos, sin in self.rotary[:, :, positions]]
        branch, residual = None, self.dropout(x)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            run = self._checkpointed(block) if again else block
            branch, residual = run(branch, residual, rotary, cache)
        if cache is not None:
            cache.advance(length)
        if last_only:
            branch, residual = (x[:, -1:] for x in (branch, residual))
        return self.norm(branch, residual)[0]

    def _checkpointed(self, block: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
        """`block`, of which only the inputs are kept. Its second run, in another thread on a GPU, has the first one's
        choice of backend and random numbers."""
        run = block if torch.compiler.is_compiling() else partial(contextvars.copy_context().run, block)
        return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=self.config.dropout > 0.0)

    def _head_weight(self, x: Tensor) -> Tensor:
        return (self.token_embedding if self.head is None else self.head).weight.to(x.dtype)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting targets (B, T) from ids (B, T); -100 in targets is left out."""
        config, targets = self.config, targets.flatten()
        if self.fp8 and torch.is_grad_enabled() and not config.logit_softcap:
            x = self._hidden(ids).flatten(0, 1)
            return ops.fp8_linear_cross_entropy(x, self._head_weight(x), targets)
        if ids.numel() * config.vocab_size * self.compute_dtype.itemsize <= MAX_LOGITS or config.logit_softcap:
            return ops.cross_entropy(self(ids).flatten(0, 1), targets, in_place=True)
        x = self._hidden(ids).flatten(0, 1)
        return ops.linear_cross_entropy(x, self._head_weight(x), targets)

    def cast_matrices(self) -> None:
        """Keep matrices in `compute_dtype`, in place of a cast of all of them for every pass: for inference."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.to(self.compute_dtype)

    def refill_tables(self) -> None:
        """What no checkpoint holds: called when a model made on the meta device has got memory and weights."""
        if self.rotary is not None:
            tables = _rotary_tables(self.config)
            assert tables is not None
            self.rotary.copy_(tables)


def _refill_tables(model: nn.Module, _: object) -> None:
    assert isinstance(model, GPT)
    model.refill_tables()


def _rotary_tables(config: Config) -> Tensor | None:
    """(n_tables, 2, context_length, D/2): cos and sin of the global layers, then those of local ones with a base."""
    if config.position != "rope":
        return None
    tables = [rope_table(config.context_length, config.head_dim, config.rope_theta, config.rope_scaling)]
    if config.local_rope_theta is not None:
        tables.append(rope_table(config.context_length, config.head_dim, config.local_rope_theta, None))
    return torch.stack(tables)
