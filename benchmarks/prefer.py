"""Write llmfast/ops/preference.py, the order auto tries GPU backends in, from benchmarks/results/<gpu>/<op>.json.

For every op and row length that was measured, the backend whose forward and backward together take least time. --check
only says whether the file agrees.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "llmfast/ops/preference.py"
MEASURED_ON = "nvidia-h200"

HEAD = '''"""Which backend was measured fastest on a GPU, by op and row length; made by benchmarks/prefer.py."""

# Op -> (longest row, backend), in order of length; the last one holds for longer rows too.
PREFERRED: dict[str, tuple[tuple[int, str], ...]] = {
'''


def row_length(case: str) -> int:
    """The second number of a label as 32768x768."""
    return int(case.split("x")[1])


def fastest(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(row length, backend) of every length, ascending; only backends that ran every case are compared."""
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["ours"] and row["ms"]:
            by_backend = times.setdefault(row_length(row["case"]), {})
            by_backend[row["provider"]] = by_backend.get(row["provider"], 0.0) + row["ms"]
    return [(length, min(by, key=by.__getitem__)) for length, by in sorted(times.items())]


def classes(measured: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Merged where neighbours agree; between two that do not, the border is the power of two above the shorter."""
    merged: list[tuple[int, str]] = []
    for length, backend in measured:
        limit = 1 << (length - 1).bit_length()
        if merged and merged[-1][1] == backend:
            merged.pop()
        merged.append((limit, backend))
    return merged


def text() -> str:
    folder = ROOT / "benchmarks/results" / MEASURED_ON
    lines = []
    for file in sorted(folder.glob("*.json")):
        rows = json.loads(file.read_text()).get("rows", [])
        if len({r["provider"] for r in rows if r["ours"] and r["ms"]}) < 2:  # nothing to choose between
            continue
        pairs = ", ".join(f'({limit}, "{backend}")' for limit, backend in classes(fastest(rows)))
        lines.append(f'    "{file.stem}": ({pairs}{"," if pairs.count("(") == 1 else ""}),\n')
    return HEAD + "".join(lines) + "}\n"


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
