"""Train and generate with a Llama of transformers: alone, over our kernels, and with Liger's.

python benchmarks/hugging_face.py --json hugging_face.json
python benchmarks/hugging_face.py --device cpu --tiny

All: Llama-3.2-1B's shape (https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json), the same random
weights in bfloat16, fused AdamW, no compiler. transformers alone uses PyTorch's scaled_dot_product_attention. The file
is not called transformers.py, which would be what `import transformers` finds from here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmfast import hardware
from llmfast.testing.bench import heading, write

SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

WARM_UP = 3


def alone(model: Any) -> None:
    """As transformers makes it."""


def ours(model: Any) -> None:
    from llmfast.integrations.transformers import accelerate

    accelerate(model)


def ours_without_logits(model: Any) -> None:
    from llmfast.integrations.transformers import accelerate

    accelerate(model, skip_logits=True)


def liger(model: Any) -> None:
    """Liger's patch, with its loss that holds no logits either. It changes transformers' module, so it comes last."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

    apply_liger_kernel_to_llama(model=model)


CONTENDERS: dict[str, Callable[[Any], None]] = {
    "transformers": alone,
    "llmfast": ours,
    "llmfast, no logits": ours_without_logits,
    "Liger": liger,
}


def make(shape: dict[str, Any], device: torch.device, dtype: torch.dtype, change: Callable[[Any], None]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.set_attn_implementation("sdpa")
    change(model)
    return model


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    started = now(device)
    result = function()
    return now(device) - started, result


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def train(model: Any, batches: list[Tensor], device: torch.device) -> dict[str, Any]:
    """Forward, backward and optimizer step; the first few are not timed."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Tensor) -> Tensor:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    results = [timed(lambda batch=batch: step(batch), device) for batch in batches]
    seconds = statistics.median(s for s, _ in results[WARM_UP:])
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": batches[0].numel() / seconds,
        "peak_bytes": peak_bytes(device),
        "losses": [loss.item() for _, loss in results],
    }


Run = Callable[[int], list[list[int]]]  # so many tokens -> the new ones of each row


def greedy(model: Any, prompt: Tensor, **options: Any) -> Run:
    """The likeliest tokens after a prompt (rows, T) as transformers generates them, over a dynamic cache by default."""
    model.eval()
    options |= {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    return lambda n: model.generate(prompt, max_new_tokens=n, **options)[:, prompt.shape[1] :].tolist()


def generate(run: Run, new: int, device: torch.device) -> dict[str, Any]:
    """The prompt's share of the time is that of asking for a single token."""
    rows = len(run(new))
    first = statistics.median(timed(lambda: run(1), device)[0] for _ in range(3))
    times, made = zip(*(timed(lambda: run(new), device) for _ in range(3)), strict=True)
    seconds = statistics.median(times)
    return {
        "ms_to_first_token": first * 1e3,
        "ms_per_token": (seconds - first) / (new - 1) * 1e3,
        "tokens_per_s": rows * (new - 1) / (seconds - first),
        "peak_bytes": peak_bytes(device),
        "tokens": made[0],
    }


def same_tokens(run: dict[str, Any], other: dict[str, Any]) -> float:
    """The share of tokens in which two results of `generate` agree."""
    pairs = zip(run["tokens"], other["tokens"], strict=True)
    return statistics.mean(a == b for row, first in pairs for a, b in zip(row, first, strict=True))


def measure(name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One contender, or why it cannot run here."""
    shape = TINY if options.tiny else SHAPE
    generator = torch.Generator().manual_seed(0)
    size = (WARM_UP + options.steps, options.batch_size, options.context)
    batches = list(torch.randint(1, shape["vocab_size"], size, generator=generator).to(device))
    prompt = torch.randint(1, shape["vocab_size"], (options.rows, options.prompt), generator=generator).to(device)
    try:
        model = make(shape, device, dtype, CONTENDERS[name])
    except ImportError as error:
        return {"name": name, "error": f"not importable: {error}"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generating = generate(greedy(model, prompt), options.new, device)  # before training changes the weights
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return {"name": name, "training": train(model, batches, device), "generating": generating}


def show(record: dict[str, Any], console: Console) -> None:
    titles = ("", "train ms", "tokens/s", "peak GB", "last loss", "first token ms", "ms a token", "tokens/s", "peak GB")
    table = Table(*titles, "same tokens", title=f"{record['model']}, {record['device']['name']}, {record['dtype']}")

    def gigabytes(part: dict[str, Any]) -> str:
        return f"{part['peak_bytes'] / 1e9:.2f}" if part["peak_bytes"] is not None else "-"

    for run in record["runs"]:
        if "error" in run:
            table.add_row(run["name"], run["error"])
            continue
        training, generating = run["training"], run["generating"]
        table.add_row(
            run["name"],
            f"{training['ms']:.1f}",
            f"{training['tokens_per_s']:,.0f}",
            gigabytes(training),
            f"{training['losses'][-1]:.4f}",
            f"{generating['ms_to_first_token']:.1f}",
            f"{generating['ms_per_token']:.2f}",
            f"{generating['tokens_per_s']:,.0f}",
            gigabytes(generating),
            f"{same_tokens(generating, record['runs'][0]['generating']):.0%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:<number> or cpu; by default a GPU if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    parser.add_argument("--tiny", action="store_true", help="a model and lengths that a CPU can do in seconds")
    parser.add_argument("--batch-size", type=int, help="sequences a training step (2)")
    parser.add_argument("--context", type=int, help="their length (4096)")
    parser.add_argument("--steps", type=int, help="how many training steps are timed (10)")
    parser.add_argument("--rows", type=int, help="sequences to generate at once (8)")
    parser.add_argument("--prompt", type=int, help="the length of their prompts (1024)")
    parser.add_argument("--new", type=int, help="tokens to generate (128)")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--commit", help="what to record as the commit measured; by default what git says, if it can")
    options = parser.parse_args()
    sizes = {"batch_size": (2, 2), "context": (4096, 64), "steps": (10, 3)}
    sizes |= {"rows": (8, 2), "prompt": (1024, 16), "new": (128, 8)}
    for name, (usual, tiny) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, tiny if options.tiny else usual)
    device, console = hardware.device(options.device), Console(width=150)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    import transformers

    record = heading(device, dtype, options.commit) | {
        "model": "tiny Llama" if options.tiny else "Llama-3.2-1B's shape",
        "transformers": transformers.__version__,
        **{name: getattr(options, name) for name in sizes},
        "runs": [],
    }
    for name in options.only or CONTENDERS:
        record["runs"].append(measure(name, options, device, dtype))
        console.print(f"[dim]{name}[/dim]")
    show(record, console)
    if options.json is not None:
        write(record, options.json)


if __name__ == "__main__":
    main()
