"""Generate with our engine beside transformers' own over the same random weights: one sequence, greedy.

python benchmarks/generate.py --json generate-llama.json
python benchmarks/generate.py --model gpt2 --json generate-gpt2.json
python benchmarks/generate.py --device cpu --tiny

Ours: by a CUDA graph that earlier calls have recorded, and without one. transformers: scaled_dot_product_attention over
its dynamic cache, and over its static one, whose decoding it compiles on a GPU. A token reads every weight, but for
embeddings that are looked up, and the keys and values so far; the share is of the bytes/s of a large copy.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hugging_face import SHAPE, TINY, Run, greedy, same_tokens
from hugging_face import generate as measure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmfast import hardware, inference
from llmfast.models import Config
from llmfast.testing.bench import heading, write
from llmfast.testing.timing import ceilings
from llmfast.weights import from_pretrained
from llmfast.weights.families import read_config

# transformers' name for the family -> what is measured, its fields (GPT-2's defaults are 124M), and those of --tiny.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama-3.2-1B's shape", SHAPE, TINY),
    "gpt2": ("GPT-2 124M's shape", {}, {"vocab_size": 512, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}),
}


def write_model(folder: Path, family: str, shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(folder)


def ours(folder: Path, prompt: Tensor, dtype: torch.dtype, **options: Any) -> Run:
    """As a run's model is loaded: matrices in the dtype that it computes in."""
    model = from_pretrained(folder, compute_dtype=dtype)
    model.cast_matrices()
    decoder, ids = inference.Decoder(model.to(prompt.device), **options), prompt[0].tolist()
    return lambda n: [list(inference.generate(decoder, ids, n, temperature=0.0))]


def theirs(folder: Path, prompt: Tensor, dtype: torch.dtype, **options: Any) -> Run:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return greedy(model.to(prompt.device), prompt, **options)


# In this order: what PyTorch's compiler holds is not given back.
CONTENDERS: dict[str, Callable[..., Run]] = {
    "llmfast": ours,
    "llmfast, no graph": partial(ours, cuda_graph=False),
    "transformers": theirs,
    "transformers, static": partial(theirs, cache_implementation="static"),
}


def bytes_per_token(config: Config, dtype: torch.dtype, length: float) -> float:
    """What decoding one token must read after `length` tokens on average."""
    looked_up = config.context_length if config.position == "learned" else 0
    looked_up += 0 if config.tie_embeddings else config.vocab_size
    cached = 2 * config.n_layer * config.n_kv_head * config.head_dim * length
    return (config.n_params - looked_up * config.d_model + cached) * dtype.itemsize


def run(name: str, make: Callable[[], Run], new: int, device: torch.device) -> dict[str, Any]:
    """One contender, or why it has no result: that of the others stands."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return {"name": name, "generating": measure(make(), new, device)}
    except Exception as error:
        return {"name": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}


def compare(family: str, shape: dict[str, Any], prompt: Tensor, record: dict[str, Any]) -> None:
    """Fill in the record's runs. The models are in memory one after another."""
    dtype, new, device = getattr(torch, record["dtype"]), record["new"], prompt.device
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, family, shape, device, dtype)
        _, config = read_config(json.loads((folder / "config.json").read_text()), family)
        for contender, make in CONTENDERS.items():
            record["runs"].append(run(contender, lambda make=make: make(folder, prompt, dtype), new, device))
    record["bytes_per_token"] = bytes_per_token(config, dtype, record["prompt"] + new / 2)
    results = [result["generating"] for result in record["runs"] if "generating" in result]
    for result in results:
        per_s = record["bytes_per_token"] / result["ms_per_token"] * 1e3
        result["bandwidth_share"] = per_s / record["ceilings"]["bytes_per_s"]
        result["same_tokens"] = same_tokens(result, results[0])


def show(record: dict[str, Any], console: Console) -> None:
    title = f"{record['model']}, {record['new']} tokens after {record['prompt']}, {record['device']['name']}"
    titles = ("", "first token ms", "ms a token", "tokens/s", "of copy bandwidth", "peak GB", "same tokens")
    table = Table(*titles, title=f"{title}, {record['dtype']}")
    for result in record["runs"]:
        if "error" in result:
            table.add_row(result["name"], result["error"])
            continue
        made = result["generating"]
        table.add_row(
            result["name"],
            f"{made['ms_to_first_token']:.2f}",
            f"{made['ms_per_token']:.3f}",
            f"{made['tokens_per_s']:,.0f}",
            f"{made['bandwidth_share']:.1%}",
            f"{made['peak_bytes'] / 1e9:.2f}" if made["peak_bytes"] is not None else "-",
            f"{made['same_tokens']:.0%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama")
    parser.add_argument("--device", help="cuda, cuda:<number> or cpu; by default a GPU if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    parser.add_argument("--tiny", action="store_true", help="a model and lengths that a CPU can do in seconds")
    parser.add_argument("--prompt", type=int, help="its length (1024, or as much as the context has room for)")
    parser.add_argument("--new", type=int, help="tokens to generate (256)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--commit", help="what to record as the commit measured; by default what git says, if it can")
    options = parser.parse_args()
    name, usual, tiny = MODELS[options.model]
    shape, device, console = tiny if options.tiny else usual, hardware.device(options.device), Console(width=150)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    import transformers

    config = transformers.AutoConfig.for_model(options.model, **shape)
    new = options.new or (16 if options.tiny else 256)
    length = options.prompt or min(32 if options.tiny else 1024, config.max_position_embeddings - new)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, config.vocab_size, (1, length), generator=generator).to(device)
    record = heading(device, dtype, options.commit) | {
        "model": f"tiny {options.model}" if options.tiny else name,
        "transformers": transformers.__version__,
        "prompt": length,
        "new": new,
        "ceilings": ceilings(device, dtype)._asdict(),
        "runs": [],
    }
    compare(options.model, shape, prompt, record)
    show(record, console)
    if options.json is not None:
        write(record, options.json)


if __name__ == "__main__":
    main()
