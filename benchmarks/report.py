"""Write README's result tables from the files in benchmarks/results/; --check only says whether they agree."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
KERNELS = (
    "Kernels against their peers: our fastest backend over the fastest peer of each case, geometric mean and worst."
    " A ratio below 1 is a loss, and is shown too. Every result of ours was checked against the float64 truth in the"
    " same run before it was timed. Every case is behind the folds, in TFLOP/s for attention (4 B H T^2 D, half for"
    " causal, times 2.5 backward) and linear cross-entropy (2 N D V; its backward is both together, 6 N D V), else"
    " in TB/s of the bytes that must move. On a CPU the peer is eager PyTorch."
)


def cell(row: dict[str, Any] | None) -> str:
    """A rate in TFLOP/s or TB/s; a dash where the provider has none."""
    if row is None or row["rate"] is None:
        return "-"
    return f"{row['rate'] / 1e12:.3g}"


def line(head: str, cells: list[str]) -> str:
    return f"| {head} | {' | '.join(cells)} |"


JOBS = (
    "Whole jobs: a training step of GPT-2 beside the same step in plain PyTorch under torch.compile, and a Llama of"
    " transformers that trains and generates with and without our kernels. Ratios are of speed, above 1 where ours is"
    " faster, and of peak memory, below 1 where ours takes less."
)

Ratios = dict[str, list[float]]


def table(record: dict[str, Any]) -> tuple[list[str], Ratios]:
    """One line a case: forward / backward of every provider, and ours over the best peer; and those ratios."""
    rows = record["rows"]
    providers = [
        p for p in dict.fromkeys(r["provider"] for r in rows) if any(r["rate"] for r in rows if r["provider"] == p)
    ]
    found = {(r["case"], r["direction"], r["provider"]): r for r in rows}
    ours = [p for p in providers if any(r["ours"] for r in rows if r["provider"] == p)]
    lines = [line("case", [*providers, "ours / best peer"]), f"|---|{'---:|' * (len(providers) + 1)}"]
    ratios: Ratios = {"fwd": [], "bwd": []}
    for case in dict.fromkeys(r["case"] for r in rows):
        quotients = []
        for direction, collected in ratios.items():
            rates = {p: found[case, direction, p]["rate"] for p in providers if (case, direction, p) in found}
            mine = max((rates[p] or 0 for p in rates if p in ours), default=0)
            peer = max((rates[p] or 0 for p in rates if p not in ours), default=0)
            quotients.append(f"{mine / peer:.2f}" if mine and peer else "-")
            if mine and peer:
                collected.append(mine / peer)
        cells = [f"{cell(found.get((case, 'fwd', p)))} / {cell(found.get((case, 'bwd', p)))}" for p in providers]
        lines.append(line(case, [*cells, " / ".join(quotients)]))
    return lines, ratios


def mean(values: list[float]) -> str:
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}" if values else "-"


def main_job(folders: list[Path]) -> list[str]:
    """`llmfast train` with no arguments: the model's bits per byte under the baselines', a column a machine."""
    records = [json.loads((f / "train.json").read_text()) for f in folders if (f / "train.json").exists()]
    rungs = list(dict.fromkeys(name for record in records for name in record["ladder"]))
    heads = [f"{r['device']['name']}, Python {r['versions']['python']}" for r in records]
    lines = [line("bits per byte", heads), f"|---|{'---:|' * len(records)}"]
    for name in sorted(rungs, key=lambda name: -records[0]["ladder"][name]):
        lines.append(line(name, [f"{r['ladder'][name]:.3f}" for r in records]))
    lines.append(line("**the model**", [f"**{r['result']['val_bpb']:.3f}**" for r in records]))
    lines.append(line("minutes, of the whole command", [f"{r['minutes']:.1f}" for r in records]))
    lines.append(line("million tokens trained on", [f"{r['result']['tokens'] / 1e6:.1f}" for r in records]))
    made = "; ".join(f"{r['device']['name']}: {r['date'][:10]}, torch {r['versions']['torch']}" for r in records)
    return [*lines, "", f"{made}.", ""]


def fold(summary: str, text: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", text, "", *lines, "", "</details>", ""]


def calls(record: dict[str, Any]) -> list[str]:
    """What a caller of small arguments waits for: forward / forward and backward in microseconds, by provider."""
    found = {(c["op"], c["provider"]): c for c in record["calls"]}
    providers = list(dict.fromkeys(c["provider"] for c in record["calls"] if c["forward_us"]))
    lines = [line("", providers), f"|---|{'---:|' * len(providers)}"]
    for op, case in dict.fromkeys((c["op"], c["case"]) for c in record["calls"]):
        timed = [found.get((op, p), {}) for p in providers]
        times = [(c.get("forward_us"), c.get("training_us")) for c in timed]
        cells = [" / ".join(f"{us:.0f}" if us else "-" for us in pair) for pair in times]
        lines.append(line(f"{op.replace('_', ' ')}, {case}", cells))
    return lines


def steps(record: dict[str, Any]) -> list[str]:
    """Training steps of one model beside each other."""
    tokens = record["batch_size"] * record["context"]
    peer = next((r["ms"] for r in record["runs"] if r["name"] == "torch.compile"), None)
    heads = ["ms", "p99 / median", "tokens/s", "ratio", "peak GB", "first step after s"]
    lines = [line("", heads), f"|---|{'---:|' * len(heads)}"]
    for run in record["runs"]:
        ms, spread = run["ms"], f"{run['p99_ms'] / run['ms']:.2f}"
        memory, first = f"{run['peak_bytes'] / 1e9:.1f}", f"{run['seconds_to_first_step']:.0f}"
        rate, ratio = f"{tokens / ms * 1e3:,.0f}", f"{peer / ms:.2f}" if peer else "-"
        lines.append(line(run["name"], [f"{ms:.2f}", spread, rate, ratio, memory, first]))
    for run in record["runs"]:
        parts = ", ".join(f"{kind} {ms:.2f}" for kind, ms in run["breakdown"].items())
        lines += ["", f"{run['name']}, ms on the device: {parts}."]
    return lines


def curves(record: dict[str, Any]) -> list[str]:
    """What runs of the same seeds end with."""
    n_seeds, last = len(next(iter(record["runs"].values()))), record["last"]
    lines = [line("", [f"seed {i}" for i in range(n_seeds)]), f"|---|{'---:|' * n_seeds}"]
    for name, runs in record["runs"].items():
        lines.append(line(name, [f"{sum(run[-last:]) / last:.4f}" for run in runs]))
    between, seeds = (record["summary"][key] for key in ("between", "seeds"))
    first, second = record["runs"]
    return [
        *lines,
        "",
        f"{first} less {second}: {between:+.4f} on average; standard deviation over seeds: {seeds:.4f}.",
    ]


def hugging_face(record: dict[str, Any]) -> list[str]:
    """A model of transformers trained and generating, alone and over the kernels of others."""
    runs = [run for run in record["runs"] if "error" not in run]
    alone = runs[0]["training"]["ms"]
    heads = ["training ms", "ratio", "tokens/s", "peak GB", "ms to first token", "ms a token", "peak GB"]
    lines = [line("", heads), f"|---|{'---:|' * len(heads)}"]
    for run in runs:
        training, made = run["training"], run["generating"]
        step = [f"{training['ms']:.1f}", f"{alone / training['ms']:.2f}", f"{training['tokens_per_s']:,.0f}"]
        waits = [f"{made['ms_to_first_token']:.1f}", f"{made['ms_per_token']:.2f}"]
        peaks = [f"{part['peak_bytes'] / 1e9:.1f}" for part in (training, made)]
        lines.append(line(run["name"], [*step, peaks[0], *waits, peaks[1]]))
    return lines


def generating(record: dict[str, Any]) -> list[str]:
    """Our engine and transformers' own, decoding one sequence of the same model."""
    heads = ["ms to first token", "ms a token", "tokens/s", "of copy bandwidth", "peak GB", "same tokens"]
    lines = [line("", heads), f"|---|{'---:|' * len(heads)}"]
    for run in record["runs"]:
        if "error" not in run:
            made = run["generating"]
            times = [f"{made['ms_to_first_token']:.1f}", f"{made['ms_per_token']:.3f}", f"{made['tokens_per_s']:,.0f}"]
            shares = [f"{made['bandwidth_share']:.0%}", f"{made['peak_bytes'] / 1e9:.1f}", f"{made['same_tokens']:.0%}"]
            lines.append(line(run["name"], [*times, *shares]))
    return lines


def jobs(stem: str, record: dict[str, Any]) -> list[str]:
    """The file's lines of the table of whole jobs: tokens a second and peak memory, ours beside each peer's."""
    size = f"{record.get('batch_size')} x {record.get('context')} tokens"
    if stem.startswith("step-"):
        tokens = record["batch_size"] * record["context"]
        what, peer = f"{record['model']} trains, {size}", "torch.compile"
        parts = [("step", what, ["llmfast", peer]), ("step", f"{what}, in 8 bits", ["llmfast fp8", peer])]
        runs = {r["name"]: {"step": r | {"tokens_per_s": tokens / r["ms"] * 1e3}} for r in record["runs"]}
    elif stem == "hugging_face":
        order = ["llmfast, no logits", "transformers", "Liger"]
        rows = f"{record['rows']} rows after {record['prompt']} tokens"
        parts = [
            ("training", f"{record['model']} trains, {size}", order),
            ("generating", f"{record['model']} generates, {rows}", order),
        ]
        runs = {run["name"]: run for run in record["runs"] if "error" not in run}
    elif stem.startswith("generate-"):
        order = ["llmfast", "transformers", "transformers, static"]
        parts = [("generating", f"{record['model']} generates, 1 row after {record['prompt']} tokens", order)]
        runs = {run["name"]: run for run in record["runs"] if "error" not in run}
    else:
        return []
    lines = []
    for part, what, order in parts:
        if order[0] not in runs:
            continue
        mine, *peers = ((name, runs[name][part]) for name in order if name in runs)
        for name, peer in peers:
            speeds, memory = (mine[1]["tokens_per_s"], peer["tokens_per_s"]), mine[1]["peak_bytes"] / peer["peak_bytes"]
            figures = [*(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}", f"{memory:.2f}"]
            lines.append(line(f"{what}, {record['device']['name']}, beside {name}", figures))
    return lines


def special(stem: str, record: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The fold of a file that holds something else than kernels' rows: what it shows, and the table."""
    on = f"{record['dtype']}, {record['device']['name']}"
    if stem == "callers":
        name = f"what a caller waits for, {on}: forward / training, us a call of small arguments"
        return name, calls(record)
    size = f"{record.get('batch_size')} x {record.get('context')} tokens"
    if stem.startswith("step-"):
        data = "" if record["data"] == "random" else f"; {record['steps']} steps on text, reading it included"
        return f"a training step of {record['model']}, {size}, {on}{data}", steps(record)
    if stem == "hugging_face":
        model = f"{record['model']} of transformers {record['transformers']}"
        return f"{model}: training, {size}, and generating {record['rows']} rows after {record['prompt']}, {on}", (
            hugging_face(record)
        )
    if stem.startswith("generate-"):
        what = f"{record['new']} tokens after {record['prompt']}, beside transformers {record['transformers']}"
        return f"{record['model']} generating {what}, {on}", generating(record)
    if stem.startswith("curves-"):
        what = f"mean loss of the last {record['last']} of {record['steps']} steps"
        return f"{what}, {record['preset']}, {size}, {on}", curves(record)
    return None


def report() -> str:
    """The main job, a summary with a line for each machine and op, and every case behind a fold."""
    folders = sorted((ROOT / "benchmarks/results").iterdir())
    summary = [line("", ["forward", "worst", "backward", "worst"]), "|---|---:|---:|---:|---:|"]
    whole = [line("tokens a second", ["ours", "peer", "ratio", "memory"]), "|---|---:|---:|---:|---:|"]
    details: list[str] = []
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            if path.stem == "train":
                continue
            record = json.loads(path.read_text())
            versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
            made = f"{versions}, {record['date'][:10]}, commit {record['commit']}."
            whole += jobs(path.stem, record)
            if other := special(path.stem, record):
                details += fold(other[0], made, other[1])
                continue
            name = f"{record['rows'][0]['op'].replace('_', ' ')}, {record['dtype']}, {record['device']['name']}"
            lines, ratios = table(record)
            cells = [f(v) for v in ratios.values() for f in (mean, lambda v: f"{min(v):.2f}" if v else "-")]
            summary.append(line(name, cells))
            unit = record.get("unit", "TFLOP/s" if path.stem.startswith("attention") else "TB/s")
            ceiling = record["ceilings"]
            measured = (
                f"{made} Measured in the same run: copy {ceiling['bytes_per_s'] / 1e12:.2f} TB/s, matrix product"
                f" {ceiling['flops'] / 1e12:.1f} TFLOP/s."
            )
            details += fold(f"{name}: {unit}, forward / backward", measured, lines)
    return "\n".join([*main_job(folders), JOBS, "", *whole, "", KERNELS, "", *summary, "", *details])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if README is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    updated = f"{head}{BEGIN}\n\n{report()}\n{END}{tail}"
    if check and updated != text:
        print("README.md's tables are not those of benchmarks/results; run: python benchmarks/report.py")
        return 1
    if not check:
        readme.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
