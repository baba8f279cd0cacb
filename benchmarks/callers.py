"""Time what a caller waits for in calls with small arguments: every op on every backend, and beside its peers.

python benchmarks/callers.py --json callers.json
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from llmfast import hardware
from llmfast.testing import bench, callers
from llmfast.testing.tables import SMALL_CASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of: {', '.join(SMALL_CASES)}; all by default")
    parser.add_argument("--device", help="cuda, cuda:<number> or cpu; by default a GPU if there is one")
    parser.add_argument("--providers", default="", help="only these providers, separated by commas")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--commit", help="what to record as the commit measured; by default what git says, if it can")
    options = parser.parse_args()
    device = hardware.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calls = []
    print(f"{'op':21}{'arguments':22}{'provider':15}{'forward':>9}{'training':>9} us")
    for op in options.ops or SMALL_CASES:
        for call in callers.measure(op, device, dtype, [p for p in options.providers.split(",") if p]):
            calls.append(call)
            figures = "".join(f"{us:9.1f}" if us else f"{'-':>9}" for us in (call.forward_us, call.training_us))
            print(f"{op:21}{call.case:22}{call.provider:15}{figures} {call.note}", flush=True)
    if options.json is not None:
        record = bench.heading(device, dtype, options.commit) | {"calls": [asdict(call) for call in calls]}
        bench.write(record, options.json)


if __name__ == "__main__":
    main()
