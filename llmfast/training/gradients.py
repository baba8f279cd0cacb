"""The forward and backward pass of one batch; on a GPU replayed as a CUDA graph, which costs the host one launch."""

import torch
from torch import Tensor

from ..models import GPT

IGNORED = -100  # in a batch: padding, neither read nor predicted
WARM_UPS = 2  # passes before the graph is recorded, in which kernels compile and libraries take their memory


class Gradients:
    """Called with batches of one shape, int64 (B, T + 1), and a weight: the loss times it, on the device, and its
    gradients in every parameter's `.grad`, in place of those there."""

    def __init__(self, model: GPT, use_graph: bool) -> None:
        self.model = model
        self.device = model.token_embedding.weight.device
        self.use_graph = use_graph and self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Tensor, weight: float) -> Tensor:
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        if not self.use_graph:
            return self._run(batch, torch.full((), weight, device=self.device))
        if self.graph is None:
            self._record(batch)
        assert self.graph is not None
        self.batch.copy_(batch)
        self.weight.fill_(weight)
        self.graph.replay()
        return self.loss

    def _run(self, batch: Tensor, weight: Tensor) -> Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.model.loss(batch[:, :-1].clamp_min(0), batch[:, 1:]) * weight
        loss.backward()
        return loss.detach()

    def _record(self, batch: Tensor) -> None:
        """The random numbers of the passes before the first replay are given back: a resumed run has the same ones."""
        self.batch, self.weight = batch.clone(), torch.ones((), device=self.device)
        random_state = torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(self.batch, self.weight)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):  # whose default is one stream of the first device to record
            self.loss = self._run(self.batch, self.weight)
        torch.cuda.set_rng_state(random_state, self.device)
