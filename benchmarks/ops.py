"""Check, then time, the ops named (all but attention if none is) on every backend and beside their peers.

python benchmarks/ops.py rms_norm cross_entropy --out results/
"""

import argparse
from pathlib import Path

from llmfast.testing.bench import run
from llmfast.testing.tables import BENCHMARK_CASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of: {', '.join(BENCHMARK_CASES)}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device")
    parser.add_argument("--only", default="", help="only cases whose label contains this text")
    parser.add_argument("--providers", default="", help="only these providers, separated by commas")
    parser.add_argument("--out", type=Path, help="write <op>.json for each into this folder")
    parser.add_argument("--commit", help="what to record as the commit measured; by default what git says, if it can")
    options = vars(parser.parse_args())
    ops, out = options.pop("ops"), options.pop("out")
    for op in ops or [op for op in BENCHMARK_CASES if op != "attention"]:
        run(op, json=out / f"{op}.json" if out else None, **options)


if __name__ == "__main__":
    main()
