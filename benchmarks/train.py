"""Time a training step of GPT-2 beside the same step as plain PyTorch under torch.compile writes it.

python benchmarks/train.py --preset gpt2 --batch-size 64 --json train.json --plot train.png
python benchmarks/train.py --data stdlib --steps 500       # batches as `llmfast train` reads them, inside the time

Both: the same model, batch, bfloat16 products with float32 weights, AdamW, gradient norm clipped to 1. The plain step
is defined here: torch.nn modules under bfloat16 autocast, scaled_dot_product_attention, fused AdamW.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from llmfast import hardware
from llmfast.cli.corpus import open_data
from llmfast.models import GPT, Config, preset
from llmfast.testing.bench import heading, write
from llmfast.testing.timing import ceilings
from llmfast.training import TrainConfig, optim
from llmfast.training.gradients import Gradients

RATE = 3e-4
VOCABULARY = 50304  # GPT-2's 50257, rounded up to a multiple of 64 as everyone does who is in a hurry


class PlainBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 of torch.nn modules."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


Step = Callable[[Tensor], Tensor]


def plain_step(config: Config, device: torch.device, compiled: bool) -> Step:
    ours = GPT(config)  # first, so that both have the same random weights
    model = PlainGPT(config)
    load_plain(model, ours)
    model.to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model

    def step(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def load_plain(plain: PlainGPT, ours: GPT) -> None:
    """Begin where ours does."""
    names = {
        "tokens": "token_embedding",
        "positions": "position_embedding",
        "head": "token_embedding",
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
        "qkv": "attention.qkv",
        "proj": "attention.proj",
        "up": "mlp.up",
        "down": "mlp.down",
    }
    state = ours.state_dict()
    plain.load_state_dict(
        {n: state[".".join(names.get(part, part) for part in n.split("."))] for n in plain.state_dict()}
    )


def our_step(config: Config, device: torch.device, batch_size: int, graph: bool, fp8: bool = False) -> Step:
    model = GPT(config, torch.bfloat16).to(device)
    model.set_fp8(fp8)
    settings = TrainConfig(max_steps=10**6, batch_size=batch_size, learning_rate=RATE, weight_decay=0.1)
    optimizer, gradients = optim.Optimizer(model, settings), Gradients(model, graph)
    count = 0

    def step(batch: Tensor) -> Tensor:
        nonlocal count
        count += 1
        loss = gradients(batch, 1.0)
        optimizer.step(RATE, count, loss)
        return loss

    return step


def measure(
    name: str, make: Callable[[], Step], batches: Callable[[int], Tensor], steps: int, device: torch.device
) -> dict[str, Any]:
    """Losses and times of steps, what makes their batches included: the first five warm up, the others are timed one by
    one."""
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    step = make()
    losses, events, first = [], [], 0.0
    for i in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        losses.append(step(on_device(batches(i), name, device)))
        end.record()
        events.append((start, end))
        if i == 0:
            torch.cuda.synchronize(device)
            first = time.perf_counter() - started
        losses[-1] = losses[-1].clone()
    torch.cuda.synchronize(device)
    in_order = [start.elapsed_time(end) for start, end in events[5:]]
    timed = sorted(in_order)
    return {
        "name": name,
        "ms": statistics.median(timed),
        "p99_ms": timed[math.ceil(0.99 * len(timed)) - 1],
        "seconds_to_first_step": first,
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "step_ms": [round(ms, 3) for ms in in_order],
        "losses": torch.stack(losses).tolist(),
        "breakdown": breakdown(step, on_device(batches(0), name, device)),
    }


def on_device(batch: Tensor, name: str, device: torch.device) -> Tensor:
    """As the step takes it: ours copies it itself."""
    return batch if name.startswith("llmfast") else batch.pin_memory().to(device, non_blocking=True)


def random_batches(options: argparse.Namespace) -> Callable[[int], Tensor]:
    """Ids of no meaning, which take as long as those of a text."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.steps, options.batch_size, options.context + 1)
    return list(torch.randint(0, 50257, shape, generator=generator)).__getitem__


def text_batches(source: str, batch_size: int, context: int, seed: int) -> Callable[[int], Tensor]:
    data = open_data(source, preset("mini").vocab_size, Console())
    return lambda i: torch.from_numpy(data.batch("train", i, batch_size, context, seed))


CATEGORIES = {  # the first that a kernel's name contains
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "products with GELU": ("mlp_hopper",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "norms": ("norm", "sum_partials"),
    "cross-entropy": ("cross_entropy", "reduce_losses", "log_softmax", "nll"),
    "GELU": ("activation", "gelu"),
    "column sums, 8-bit rounding": ("round_kernel", "columns_kernel"),
    "AdamW": ("adam", "multi_tensor"),
    "embedding": ("embedding", "sort", "radix", "searchsorted", "index"),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "cat"),
}


def breakdown(step: Step, batch: Tensor) -> dict[str, float]:
    """Milliseconds a step on the device by kind of kernel. Inductor names its kernels after what they fuse."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(batch)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in CATEGORIES.items() if any(p in name for p in parts)), "other")
        times[kind] += event.device_time_total / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def show(record: dict[str, Any], tokens: int, flops: dict[str, float], console: Console) -> None:
    table = Table(title=f"{record['model']}, {record['batch_size']} x {record['context']} tokens a step")
    for heading_ in ("", "ms", "p99", "tokens/s", *flops, "of measured GEMM rate", "peak GB", "first step s"):
        table.add_column(heading_, justify="right" if heading_ else "left")
    peak, gemm = record["device"]["peak_flops"], record["ceilings"]["flops"]
    for run in record["runs"]:
        per_second = tokens / run["ms"] * 1e3
        shares = [f"{per_second * f / peak:.1%}" for f in flops.values()] if peak else ["-"] * len(flops)
        table.add_row(
            run["name"],
            f"{run['ms']:.2f}",
            f"{run['p99_ms']:.2f}",
            f"{per_second:,.0f}",
            *shares,
            f"{per_second * flops['MFU, causal'] / gemm:.1%}",
            f"{run['peak_bytes'] / 1e9:.1f}",
            f"{run['seconds_to_first_step']:.1f}",
        )
    console.print(table)
    for run in record["runs"]:
        parts = ", ".join(f"{kind} {ms:.2f}" for kind, ms in run["breakdown"].items())
        console.print(f"{run['name']}: ms on the device: {parts}; last loss {run['losses'][-1]:.4f}")


def draw(record: dict[str, Any], path: Path) -> None:
    """Where a step's time goes, a bar a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2 + 0.6 * len(record["runs"])), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for run in record["runs"] for kind in run["breakdown"]))
    left = [0.0] * len(record["runs"])
    for kind in kinds:
        widths = [run["breakdown"].get(kind, 0.0) for run in record["runs"]]
        axes.barh([run["name"] for run in record["runs"]], widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("ms on the device, one step")
    axes.invert_yaxis()
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    axes.set_title(
        f"{record['model']}, {record['batch_size']} x {record['context']} tokens, {record['device']['name']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=25, help="of which the first five are not timed")
    parser.add_argument("--data", help="a text to train on, as llmfast train takes it; by default ids of no meaning")
    parser.add_argument("--only", choices=["llmfast", "llmfast fp8", "torch.compile", "eager"], action="append")
    parser.add_argument("--no-graph", action="store_true", help="launch every kernel of ours from the host")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="also draw where the time goes into this PNG")
    parser.add_argument("--commit", help="what to record as the commit measured; by default what git says, if it can")
    options = parser.parse_args()
    device, console = hardware.device("cuda"), Console(width=140)
    config = preset(options.preset, vocab_size=VOCABULARY)
    text = options.data and text_batches(options.data, options.batch_size, options.context, 0)
    batches = text or random_batches(options)
    makers: dict[str, Callable[[], Step]] = {
        "llmfast": lambda: our_step(config, device, options.batch_size, not options.no_graph),
        "llmfast fp8": lambda: our_step(config, device, options.batch_size, not options.no_graph, True),
        "torch.compile": lambda: plain_step(config, device, True),
        "eager": lambda: plain_step(config, device, False),
    }
    torch.set_float32_matmul_precision("high")
    record = heading(device, torch.bfloat16, options.commit) | {
        "model": options.preset,
        "batch_size": options.batch_size,
        "context": options.context,
        "steps": options.steps,
        "data": options.data or "random",
        "graph": not options.no_graph,
        "ceilings": ceilings(device, torch.bfloat16)._asdict(),
        "runs": [],
    }
    for name in options.only or ["llmfast", "torch.compile"]:
        record["runs"].append(measure(name, makers[name], batches, options.steps, device))
        torch.cuda.empty_cache()
    matrices = config.n_params - config.context_length * config.d_model
    plain = 6.0 * matrices + 12.0 * config.n_layer * config.d_model * options.context
    flops = {"MFU, nanoGPT's": plain, "MFU, causal": config.flops_per_token(options.context)}
    show(record, options.batch_size * options.context, flops, console)
    if options.plot is not None:
        draw(record, options.plot)
    if options.json is not None:
        write(record, options.json)


if __name__ == "__main__":
    main()
