"""Write llmfast/ops/preference.py, the order auto tries GPU backends in, from the files in benchmarks/results/<gpu>/.

For every op, direction and row length that was measured, the backend that takes least time; within 1 %, that of the
next shorter rows. For small arguments, whose kernels run no longer than it takes to launch them, the one whose calls,
without a gradient or for it, take the caller least time (callers.json); within 10 %, as hosts vary, that of the
shortest rows. --check only says whether the file agrees.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "llmfast/ops/preference.py"
MEASURED_ON = "nvidia-h200"

HEAD = '''\
"""Which backend was measured fastest on a GPU, by op, direction and row length: benchmarks/prefer.py wrote it."""

from typing import Literal

# Op -> direction -> (longest row, backend), in order of length; the last one holds for longer rows too.
PREFERRED: dict[str, dict[Literal["fwd", "bwd"], tuple[tuple[int, str], ...]]] = {
'''
SMALL = """# Op -> direction -> backend for arguments of so few elements that launching takes longer than running.
SMALL = 2**20
PREFERRED_WHERE_SMALL: dict[str, dict[Literal["fwd", "bwd"], str]] = {
"""
TIE, HOST_TIE = 1.01, 1.1


def row_length(case: str) -> int:
    """The second number of a label as 32768x768."""
    return int(case.split("x")[1])


def fastest(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(row length, backend) of every length, ascending, among rows of one direction."""
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        by_backend = times.setdefault(row_length(row["case"]), {})
        by_backend[row["provider"]] = by_backend.get(row["provider"], 0.0) + row["ms"]
    measured: list[tuple[int, str]] = []
    for length, by in sorted(times.items()):
        best = min(by, key=by.__getitem__)
        before = measured[-1][1] if measured else best
        measured.append((length, before if by.get(before, math.inf) <= TIE * by[best] else best))
    return measured


def classes(measured: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Merged where neighbours agree; between two that do not, the border is the power of two above the shorter."""
    merged: list[tuple[int, str]] = []
    for length, backend in measured:
        limit = 1 << (length - 1).bit_length()
        if merged and merged[-1][1] == backend:
            merged.pop()
        merged.append((limit, backend))
    return merged


def quickest(calls: list[dict[str, Any]], op: str, direction: str, usual: str) -> str:
    """The backend that takes its caller least time, if `usual` takes notably more."""
    times = {
        call["provider"]: call["forward_us"] if direction == "fwd" else call["training_us"] - call["forward_us"]
        for call in calls
        if call["op"] == op and call["ours"] and call["training_us"]
    }
    best = min(times, key=times.__getitem__)
    return usual if times[usual] <= HOST_TIE * times[best] else best


def text() -> str:
    folder = ROOT / "benchmarks/results" / MEASURED_ON
    calls = json.loads((folder / "callers.json").read_text())["calls"]
    lines, small = [], []
    for file in sorted(folder.glob("*.json")):
        record, op = json.loads(file.read_text()), file.stem
        if "runs" in record:  # of whole jobs
            continue
        rows = [r for r in record.get("rows", []) if r["ours"] and r["ms"]]
        if len({r["provider"] for r in rows}) < 2:  # nothing to choose between
            continue
        lines.append(f'    "{op}": {{\n')
        where_small = {}
        for direction in ("fwd", "bwd"):
            measured = classes(fastest([r for r in rows if r["direction"] == direction]))
            pairs = ", ".join(f'({limit}, "{backend}")' for limit, backend in measured)
            lines.append(f'        "{direction}": ({pairs}{"," if len(measured) == 1 else ""}),\n')
            where_small[direction] = quickest(calls, op, direction, measured[0][1])
        lines.append("    },\n")
        small.append(f'    "{op}": {json.dumps(where_small)},\n')
    return "".join([HEAD, *lines, "}\n\n", SMALL, *small, "}\n"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is out of date")
    if parser.parse_args().check:
        if TARGET.read_text(encoding="utf-8") != text():
            print("llmfast/ops/preference.py is not that of benchmarks/results; run: python benchmarks/prefer.py")
            return 1
        return 0
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
