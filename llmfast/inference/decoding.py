"""A model that reads tokens into a key-value cache; on a GPU it can read a single one by replaying a CUDA graph, which
costs the host one launch in place of hundreds."""

import functools

import torch
from torch import Tensor

from .. import ops
from ..models import GPT, DeviceKVCache, KVCache

# Single tokens that are read before the graph is recorded. In these passes kernels compile and libraries take their
# memory; and recording takes the host about as long as some of them, so that a shorter answer would not repay it.
EAGER = 8
# Tokens that a cache has room for at first: one for all of a long context could take more memory than the model.
FIRST_CAPACITY = 4096


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Of the model's device, which need not be the current one; and one for all graphs, as matrix products keep a
    workspace for every stream that they were ever called on."""
    return torch.cuda.Stream(device)


class Decoder:
    """A model, in eval mode, and a cache that grows up to its context, for one sequence at a time.

    `decoder(ids)` reads ids after those read since `begin` and gives the logits (1, V) of the next token, which the
    next call may overwrite. InputError where the context cannot hold them.

    On a GPU, unless `cuda_graph` is False, the forward pass of one token is recorded as a CUDA graph, whose every
    tensor stays where it is: the token and its position are written into it from the host before each replay, after any
    prompt. The results are those of the eager pass, but Python, hooks of modules among it, no longer runs.
    """

    def __init__(self, model: GPT, cuda_graph: bool = True) -> None:
        config, weight = model.config, model.token_embedding.weight
        self.model = model
        kind = DeviceKVCache if cuda_graph and weight.is_cuda else KVCache
        self.cache = kind(config, 1, min(config.context_length, FIRST_CAPACITY), weight.device, model.compute_dtype)
        self.n_begun = 0
        self._token = torch.zeros(1, 1, device=weight.device, dtype=torch.int64)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._n_single = 0
        self._recorded: tuple[object, ...] = ()

    def begin(self) -> int:
        """Begin another sequence, whose number is returned; `n_begun` is that of the last one.

        A graph calls the kernels of the backend, and reads parameters and buffers where they lay, of the time it was
        recorded: where either has changed, another one is recorded.
        """
        self.cache.length = 0
        self.n_begun += 1
        tensors = *self.model.parameters(), *self.model.buffers()
        recorded = ops.current_backend(), *(t.data_ptr() for t in tensors)
        if recorded != self._recorded:
            self._graph, self._n_single, self._recorded = None, 0, recorded
        return self.n_begun

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> Tensor:
        self._make_room(self.cache.length + len(ids))
        if len(ids) > 1 or not isinstance(self.cache, DeviceKVCache):
            return self._read(torch.tensor([ids], device=self._token.device))
        self._token.fill_(ids[0])
        self.cache.place()
        self._n_single += 1
        if self._n_single <= EAGER:
            return self._read(self._token)
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        self.cache.advance(1)
        return self._logits

    def _make_room(self, n_tokens: int) -> None:
        """At least twice as much, so that no token is copied often. The model refuses more than its context."""
        capacity, context = self.cache.capacity, self.model.config.context_length
        if capacity < n_tokens <= context:
            self._graph, self._n_single = None, 0
            with torch.inference_mode(False):  # as the first ones were made, so that anyone may write to them
                self.cache.grow(min(context, max(n_tokens, 2 * capacity)))

    def _read(self, ids: Tensor) -> Tensor:
        return self.model(ids, self.cache, last_only=True)[:, -1]

    def _record(self) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), _recording_stream(self._token.device)
        # What other threads of the process ask of the device meanwhile is no matter of this recording.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._read(self._token)
        self.cache.length -= 1  # recording computes nothing, so the token is not held yet
        return graph
