"""Train ours and the plain torch.compile step of benchmarks/train.py on the same text: do the losses agree?

python benchmarks/loss.py --steps 500 --seeds 3 --json curves-gpt2.json --plot curves.png

A seed draws the weights and the order of the text, the same for both. They agree if what lies between the two at the
end, averaged over the seeds, is less than what lies between one's own seeds.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import train
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmfast import hardware
from llmfast.models import preset
from llmfast.testing.bench import heading

LAST = 50  # steps whose mean loss is a run's result


def losses(name: str, options: argparse.Namespace, seed: int, device: torch.device) -> list[float]:
    """Of each step of one run."""
    config = preset(options.preset, vocab_size=train.VOCABULARY)
    batches = train.text_batches(options.data, options.batch_size, options.context, seed)
    torch.manual_seed(seed)
    if name == "torch.compile":
        step = train.plain_step(config, device, True)
    else:
        step = train.our_step(config, device, options.batch_size, True, fp8=name == "llmfast fp8")
    found: list[Tensor] = []
    for i in range(options.steps):
        found.append(step(train.on_device(batches(i), name, device)).clone())
    return [round(loss, 4) for loss in torch.stack(found).tolist()]


def summary(runs: dict[str, list[list[float]]]) -> dict[str, float]:
    """The mean distance of the two results of a seed, and the standard deviation of the second one over seeds."""
    results = {name: [statistics.mean(run[-LAST:]) for run in per_seed] for name, per_seed in runs.items()}
    first, second = results.values()
    return {
        "between": statistics.mean(a - b for a, b in zip(first, second, strict=True)),
        "largest": max(abs(a - b) for a, b in zip(first, second, strict=True)),
        "seeds": statistics.stdev(second),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for color, (name, per_seed) in zip(("C0", "C1"), record["runs"].items(), strict=True):
        for seed, run in enumerate(per_seed):
            smooth = [statistics.mean(run[max(0, i - 19) : i + 1]) for i in range(len(run))]
            style = {"color": color, "linewidth": 1.2, "linestyle": ("-", "--", ":")[seed % 3]}
            whole.plot(smooth, label=name if seed == 0 else None, **style)
            end.plot(range(len(run) - 2 * LAST, len(run)), smooth[-2 * LAST :], **style)
    whole.set(title="loss, mean of 20 steps", xlabel="step", ylabel="nats per token")
    end.set(title=f"the last {2 * LAST} steps; lines: seeds", xlabel="step")
    whole.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--data", default="stdlib", help="a text as llmfast train takes it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fp8", action="store_true", help="ours in 8 bits beside ours, not beside the plain step")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="also draw the losses into this PNG")
    parser.add_argument("--commit", help="what to record as the commit measured; by default what git says, if it can")
    options = parser.parse_args()
    device, console = hardware.device("cuda"), Console(width=120)
    torch.set_float32_matmul_precision("high")
    sizes = {name: getattr(options, name) for name in ("preset", "data", "batch_size", "context", "steps")}
    record: dict[str, Any] = heading(device, torch.bfloat16, options.commit) | sizes | {"last": LAST}
    record["runs"] = {
        name: [losses(name, options, seed, device) for seed in range(options.seeds)]
        for name in (("llmfast fp8", "llmfast") if options.fp8 else ("llmfast", "torch.compile"))
    }
    record["summary"] = summary(record["runs"])
    table = Table("", *(f"seed {seed}" for seed in range(options.seeds)), title=f"mean loss of the last {LAST} steps")
    for name, per_seed in record["runs"].items():
        table.add_row(name, *(f"{statistics.mean(run[-LAST:]):.4f}" for run in per_seed))
    console.print(table)
    console.print(
        "first less second {between:+.4f}, at most {largest:.4f}; seeds {seeds:.4f}".format(**record["summary"])
    )
    if options.plot is not None:
        draw(record, options.plot)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
